package credentials

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/backoff"
)

// watchEvery is how often a [Watcher] reads all files.
const watchEvery = 3 * time.Second

// Reloader is a credential in files.
type Reloader interface {
	// Reload reads the files again and reports whether that made a difference. If it
	// returns an error, the credential has not changed.
	Reload() (changed bool, err error)
}

// Watcher keeps credentials current while a server runs. Its fields must not change after
// the first call of a method.
type Watcher struct {
	Items  map[string]Reloader // by the name that logs have
	Logger hclog.Logger
	Failed func(name string) // is called with each item that could not be reloaded

	mu       sync.Mutex // held during a reload
	failures map[string]*backoff.Throttle
}

// Run reloads all items every few seconds until ctx ends. It logs what changes. It logs an
// item that cannot be reloaded once a minute.
func (w *Watcher) Run(ctx context.Context) {
	for backoff.Sleep(ctx, watchEvery) == nil {
		w.reload(false)
	}
}

// Reload reloads all items now, and logs the result for each.
func (w *Watcher) Reload() { w.reload(true) }

func (w *Watcher) reload(asked bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failures == nil {
		w.failures = make(map[string]*backoff.Throttle)
	}
	reloaded, changed := []string{}, []string{}
	for _, name := range slices.Sorted(maps.Keys(w.Items)) {
		failure := w.failures[name]
		if failure == nil {
			failure = new(backoff.Throttle)
			w.failures[name] = failure
		}
		differs, err := w.Items[name].Reload()
		if err == nil || asked {
			failure.Reset()
		}
		if err != nil {
			w.Logger.Log(failure.Level(), "reload_failed", "name", name, "error", err)
			w.Failed(name)
			continue
		}
		reloaded = append(reloaded, name)
		if differs {
			changed = append(changed, name)
		}
	}
	if asked || len(changed) > 0 {
		w.Logger.Info("reloaded", "names", reloaded, "changed", changed)
	}
}
