package process

import (
	"context"
	"maps"

	"github.com/bivouac/bivouac/runtime"
)

// watcher collects the sandboxes that changed until its Watch reads them. Its size is
// bounded by the number of sandboxes. Driver.mu guards it.
type watcher struct {
	changed map[string]struct{}
	wake    chan struct{}
}

// Watch calls changed for each sandbox that becomes ready or ends.
func (d *Driver) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	w := &watcher{changed: map[string]struct{}{}, wake: make(chan struct{}, 1)}
	d.mu.Lock()
	d.watchers[w] = struct{}{}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.watchers, w)
		d.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.wake:
		}
		d.mu.Lock()
		ids := maps.Clone(w.changed)
		clear(w.changed)
		d.mu.Unlock()
		for id := range ids {
			if sandbox, err := d.Inspect(ctx, id); err == nil { // an error means that it was deleted in the meantime
				changed(sandbox)
			}
		}
	}
}

// notify tells the watchers that a sandbox changed.
func (d *Driver) notify(sessionID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for w := range d.watchers {
		w.changed[sessionID] = struct{}{}
		select {
		case w.wake <- struct{}{}:
		default: // it is awake already
		}
	}
}
