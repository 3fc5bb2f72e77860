package pluginhost

import (
	"runtime"
	"sync"
)

// launcher starts processes from one thread that lives as long as the host. With
// Pdeathsig Linux ends a child when the thread that started it ends, not when the
// process ends. Go may end any thread that is not locked.
type launcher struct {
	starts  chan func()
	running sync.WaitGroup
}

func newLauncher() *launcher { return &launcher{starts: make(chan func())} }

// run starts the launcher's thread. Call close when done.
func (l *launcher) run() {
	l.running.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for start := range l.starts {
			start()
		}
	})
}

// do calls start on the launcher's thread. It must not be called after close.
func (l *launcher) do(start func() error) error {
	failed := make(chan error, 1)
	l.starts <- func() { failed <- start() }
	return <-failed
}

// close returns once the thread has ended.
func (l *launcher) close() {
	close(l.starts)
	l.running.Wait()
}
