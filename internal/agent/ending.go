package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/process"
	"github.com/bivouac/bivouac/runtime"
)

// endLimit is how long the sandboxes of a -dev server may take to end, all together.
const endLimit = 10 * time.Second

// endWithAgent makes the sandboxes of all runtimes end with the server, as their
// records do. If an earlier server at the same address was killed, its sandboxes are
// ended before this server serves anything.
func (b *base) endWithAgent(c config.Config, host *pluginhost.Host, log hclog.Logger) {
	drivers := maps.Clone(b.drivers)
	b.prepare = func(ctx context.Context) error {
		if err := endAllAbandoned(ctx); err != nil { // what remains does no harm
			log.Warn("leftovers_not_ended", "runtime", process.Name, "error", err)
		}
		if err := endLeftovers(ctx, c.HTTPAddrs[0]); err != nil {
			return fmt.Errorf("end what an earlier server left: %w", err)
		}
		b.awaitPlugins(ctx)
		// If a plugin does not start, the sandboxes that it left do no harm:
		// sessions of this server have new IDs.
		for name, err := range endEach(ctx, drivers, endAll) {
			log.Warn("leftovers_not_ended", "runtime", name, "error", err)
		}
		return ctx.Err()
	}
	b.parts = append(b.parts, part{"sandboxes", func(ctx context.Context) error {
		<-ctx.Done()
		drivers := maps.Clone(drivers)
		for _, p := range host.Status() {
			if p.Info.Name == "" { // it was never up, so it has no sandboxes of this server
				delete(drivers, p.Name)
			}
		}
		failed := endEach(context.WithoutCancel(ctx), drivers, endOnceUp)
		return errors.Join(slices.Collect(maps.Values(failed))...)
	}})
}

func endAllAbandoned(ctx context.Context) error {
	root, err := devRoot()
	if err != nil {
		return err
	}
	return EndAbandoned(ctx, root, 0)
}

// endLeftovers ends the sandboxes that the process runtime of an earlier server at this
// address left.
func endLeftovers(ctx context.Context, addr string) error {
	dir, err := devDir(addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	return process.EndLeftovers(ctx, filepath.Join(dir, sandboxFolder))
}

// endEach ends the sandboxes of all drivers within endLimit. It returns the errors by
// the driver's name.
func endEach(ctx context.Context, drivers map[string]runtime.Driver, end func(context.Context, runtime.Driver) error) map[string]error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	var (
		all    sync.WaitGroup
		mu     sync.Mutex
		failed = map[string]error{}
	)
	for name, driver := range drivers {
		all.Go(func() {
			if err := end(ctx, driver); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed[name] = fmt.Errorf("runtime %s: %w", name, err)
			}
		})
	}
	all.Wait()
	return failed
}

// endOnceUp works as endAll does, but first waits for a plugin that is not up. If the
// plugin crashes meanwhile, it tries once more. It does not delay other drivers.
func endOnceUp(ctx context.Context, driver runtime.Driver) error {
	var err error
	for range 2 {
		if plugin, ok := driver.(interface{ AwaitReturn(context.Context) error }); ok {
			_ = plugin.AwaitReturn(ctx) // on an error, endAll fails too and says why
		}
		if err = endAll(ctx, driver); err == nil {
			return nil
		}
	}
	return err
}

// endAll deletes every sandbox of the driver.
func endAll(ctx context.Context, driver runtime.Driver) error {
	var all errgroup.Group
	all.SetLimit(16)
	var listErr error
	for sandbox, err := range driver.List(ctx) {
		if err != nil {
			listErr = err
			break
		}
		all.Go(func() error { return driver.Delete(ctx, sandbox.SessionID) })
	}
	return errors.Join(listErr, all.Wait())
}
