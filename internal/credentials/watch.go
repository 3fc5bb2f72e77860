package credentials

import (
	"context"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/backoff"
)

// watchEvery is how often [Watch] reads all files.
const watchEvery = 3 * time.Second

// Reloader is a credential in files.
type Reloader interface {
	// Reload reads the files again and reports whether that made a difference. If it
	// returns an error, the credential has not changed.
	Reload() (changed bool, err error)
}

// Watch reloads all items every few seconds and on each hangup, until ctx ends. It logs
// what it reloads by its key in items. It logs a failure, at most once a minute while it
// lasts, and calls failed with the key.
func Watch(ctx context.Context, log hclog.Logger, hangups <-chan os.Signal, items map[string]Reloader, failed func(name string)) {
	told := make(map[string]*backoff.Throttle, len(items))
	for name := range items {
		told[name] = new(backoff.Throttle)
	}
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for {
		hangup := false
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-hangups:
			hangup = true
		}
		read, changed := []string{}, []string{}
		for _, name := range slices.Sorted(maps.Keys(items)) {
			differs, err := items[name].Reload()
			if err != nil {
				if hangup {
					told[name].Reset() // the operator waits for the result
				}
				log.Log(told[name].Level(), "reload_failed", "name", name, "error", err)
				failed(name)
				continue
			}
			told[name].Reset()
			read = append(read, name)
			if differs {
				changed = append(changed, name)
			}
		}
		if hangup || len(changed) > 0 {
			log.Info("reloaded", "names", read, "changed", changed)
		}
	}
}
