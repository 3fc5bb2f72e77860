package credentials

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
)

// watched is a credential whose next reload the test decides.
type watched struct {
	mu      sync.Mutex
	reloads int
	changed bool
	err     error
}

func (w *watched) Reload() (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reloads++
	return w.changed, w.err
}

func (w *watched) set(changed bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reloads, w.changed, w.err = 0, changed, err
}

func (w *watched) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reloads
}

// lines is a log whose lines the test takes away.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return strings.Split(strings.TrimSuffix(l.text.String(), "\n"), "\n")
}

func TestWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		steady, turning := &watched{}, &watched{}
		var out lines
		log := hclog.New(&hclog.LoggerOptions{Output: &out, DisableTime: true, Level: hclog.Info})
		failures := map[string]int{}
		ctx, stop := context.WithCancel(t.Context())
		var watching sync.WaitGroup
		w := &Watcher{
			Items: map[string]Reloader{"consul_token": turning, "tls": steady}, Logger: log, Failed: func(name string) { failures[name]++ },
		}
		watching.Go(func() { w.Run(ctx) })
		pass := func(d time.Duration) []string {
			time.Sleep(d)
			synctest.Wait()
			return out.take()
		}
		reload := func() []string {
			w.Reload()
			return out.take()
		}

		// It reads regularly, and logs nothing while nothing changes.
		must.Eq(t, []string{""}, pass(10*watchEvery+1))
		must.Eq(t, 10, steady.count())

		// It logs what changed.
		turning.set(true, nil)
		must.Eq(t, []string{`[INFO]  reloaded: names=["consul_token", "tls"] changed=["consul_token"]`}, pass(watchEvery))

		// A failure is logged once a minute, and each one is counted.
		turning.set(false, errors.New("is empty"))
		failed := `[WARN]  reload_failed: name=consul_token error="is empty"`
		must.Eq(t, []string{failed}, pass(10*watchEvery))
		must.Eq(t, map[string]int{"consul_token": 10}, failures)

		// On request it reads at once, and always logs the result.
		turning.set(false, errors.New("is empty"))
		must.Eq(t, []string{failed, `[INFO]  reloaded: names=["tls"] changed=[]`}, reload())
		must.Eq(t, 1, turning.count())
		turning.set(false, nil)
		must.Eq(t, []string{`[INFO]  reloaded: names=["consul_token", "tls"] changed=[]`}, reload())

		stop()
		watching.Wait()
	})
}
