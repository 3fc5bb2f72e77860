package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/bivouac/bivouac/runtime"
)

// Driver is a plugin's driver over all the lives of its process. While there is
// none, its methods return [runtime.ErrUnavailable] at once; only Watch waits.
// Its errors name the plugin.
type Driver struct{ plugin *plugin }

var (
	_ runtime.Driver        = (*Driver)(nil)
	_ runtime.Watcher       = (*Driver)(nil)
	_ runtime.HealthChecker = (*Driver)(nil)
	_ runtime.LogReader     = (*Driver)(nil)
)

// AwaitReturn waits until the plugin is up, if it was up once.
func (d *Driver) AwaitReturn(ctx context.Context) error {
	if d.plugin.current().Info.Name == "" {
		return nil // it never was
	}
	_, err := d.plugin.await(ctx)
	return err
}

// call makes a call to the plugin, if it is up.
func call[T any](ctx context.Context, d *Driver, ask func(*instance) (T, error)) (T, error) {
	var none T
	inc, err := d.plugin.now()
	if err != nil {
		return none, err
	}
	answer, err := ask(inc)
	if err != nil {
		return none, d.plugin.wrap(inc.explain(ctx, err))
	}
	return answer, nil
}

// each passes on what the plugin yields, if it is up.
func each[T any](ctx context.Context, d *Driver, ask func(*instance) iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		inc, err := d.plugin.now()
		if err != nil {
			yield(none, err)
			return
		}
		for item, err := range ask(inc) {
			if err != nil {
				yield(none, d.plugin.wrap(inc.explain(ctx, err)))
				return
			}
			if !yield(item, nil) {
				return
			}
		}
	}
}

// Info answers with the plugin's name in this Bivouac.
func (d *Driver) Info(ctx context.Context) (runtime.Info, error) {
	return call(ctx, d, func(inc *instance) (runtime.Info, error) {
		info := inc.info
		info.Name = d.plugin.spec.Name
		return info, nil
	})
}

// Create refuses a sandbox that the plugin has handed out for another session.
func (d *Driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	return call(ctx, d, func(inc *instance) (runtime.Sandbox, error) {
		sandbox, err := inc.driver.Create(ctx, spec, progress)
		if err != nil {
			return runtime.Sandbox{}, err
		}
		select {
		case <-inc.learned:
		case <-ctx.Done():
			return runtime.Sandbox{}, ctx.Err()
		}
		if err := d.claim(ctx, inc, sandbox); err != nil {
			return runtime.Sandbox{}, err
		}
		return sandbox, nil
	})
}

// claim notes that the sandbox's container is its session's.
func (d *Driver) claim(ctx context.Context, inc *instance, sandbox runtime.Sandbox) error {
	other, taken := d.plugin.owners.claim(sandbox)
	if !taken {
		return nil
	}
	// Names of containers, such as process IDs, may come again.
	standing, err := inc.driver.Inspect(ctx, other)
	switch {
	case errors.Is(err, runtime.ErrNotFound):
	case err != nil:
		return err
	case standing.ContainerID == sandbox.ContainerID && standing.State != runtime.StateDead:
		return fmt.Errorf("%w: the plugin broke its contract: it answered for session %s with container %q, which is that of session %s",
			runtime.ErrUnavailable, sandbox.SessionID, sandbox.ContainerID, other)
	}
	d.plugin.owners.replace(sandbox)
	return nil
}

// Stop asks the plugin.
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	_, err := call(ctx, d, func(inc *instance) (struct{}, error) {
		return struct{}{}, inc.driver.Stop(ctx, sessionID)
	})
	return err
}

// Delete asks the plugin.
func (d *Driver) Delete(ctx context.Context, sessionID string) error {
	_, err := call(ctx, d, func(inc *instance) (struct{}, error) {
		return struct{}{}, inc.driver.Delete(ctx, sessionID)
	})
	if err == nil {
		d.plugin.owners.release(sessionID)
	}
	return err
}

// Inspect refuses a sandbox that is another session's, as Create does.
func (d *Driver) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	return call(ctx, d, func(inc *instance) (runtime.Sandbox, error) {
		sandbox, err := inc.driver.Inspect(ctx, sessionID)
		if err != nil {
			return runtime.Sandbox{}, err
		}
		if err := d.claim(ctx, inc, sandbox); err != nil {
			return runtime.Sandbox{}, err
		}
		return sandbox, nil
	})
}

// List notes whose container is whose. What it shows twice the next Create or
// Inspect finds out.
func (d *Driver) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return each(ctx, d, func(inc *instance) iter.Seq2[runtime.Sandbox, error] {
		return func(yield func(runtime.Sandbox, error) bool) {
			for sandbox, err := range inc.driver.List(ctx) {
				if err == nil {
					d.plugin.owners.claim(sandbox)
				}
				if !yield(sandbox, err) {
					return
				}
			}
		}
	})
}

// Watch waits for the plugin to be up and reports until that process ends.
func (d *Driver) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	inc, err := d.plugin.await(ctx)
	if err != nil {
		return err
	}
	return d.plugin.wrap(inc.explain(ctx, inc.driver.Watch(ctx, changed)))
}

// Health tells of the plugin's process, and then what the plugin itself tells.
func (d *Driver) Health(ctx context.Context) error {
	_, err := call(ctx, d, func(inc *instance) (struct{}, error) {
		return struct{}{}, inc.driver.Health(ctx)
	})
	return err
}

// Logs asks the plugin.
func (d *Driver) Logs(ctx context.Context, sessionID string, follow bool) iter.Seq2[runtime.LogChunk, error] {
	return each(ctx, d, func(inc *instance) iter.Seq2[runtime.LogChunk, error] {
		return inc.driver.Logs(ctx, sessionID, follow)
	})
}
