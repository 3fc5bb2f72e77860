package pluginhost

import "runtime"

// launcher starts processes from one thread that lives as long as the host. With
// Pdeathsig Linux ends a child when the thread that started it ends, not when the
// process ends. Go may end any thread that is not locked.
type launcher struct {
	starts chan func()
}

func newLauncher() *launcher { return &launcher{starts: make(chan func())} }

func (l *launcher) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for start := range l.starts {
		start()
	}
}

// do calls start on the launcher's thread. It must not be called after close.
func (l *launcher) do(start func() error) error {
	failed := make(chan error, 1)
	l.starts <- func() { failed <- start() }
	return <-failed
}

func (l *launcher) close() { close(l.starts) }
