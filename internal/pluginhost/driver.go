package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/bivouac/bivouac/runtime"
)

// Driver is a plugin's driver. It stays the same when the plugin's process is
// restarted. While no process is up, its methods return [runtime.ErrUnavailable] at
// once; only Watch waits. Its errors name the plugin.
type Driver struct{ plugin *plugin }

var (
	_ runtime.Driver        = (*Driver)(nil)
	_ runtime.Watcher       = (*Driver)(nil)
	_ runtime.HealthChecker = (*Driver)(nil)
	_ runtime.LogReader     = (*Driver)(nil)
	_ runtime.Execer        = (*Driver)(nil)
	_ runtime.Explainer     = (*Driver)(nil)
	_ runtime.Claimer       = (*Driver)(nil)
)

// AwaitReturn waits until the plugin is up. It returns at once if the plugin has never
// been up.
func (d *Driver) AwaitReturn(ctx context.Context) error {
	if d.plugin.current().Info.Name == "" {
		return nil // it was never up
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

// each yields what the plugin yields, if it is up.
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

// Info returns the plugin's info with the name that it has in the host's configuration.
func (d *Driver) Info(ctx context.Context) (runtime.Info, error) {
	return call(ctx, d, func(inc *instance) (runtime.Info, error) {
		info := inc.info
		info.Name = d.plugin.spec.Name
		return info, nil
	})
}

// Create refuses a sandbox whose container already belongs to another session.
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
		if err := d.checkOwner(ctx, inc, sandbox); err != nil {
			return runtime.Sandbox{}, err
		}
		return sandbox, nil
	})
}

// checkOwner records that the sandbox's container belongs to its session. It returns an
// error if the container belongs to the running sandbox of another session.
func (d *Driver) checkOwner(ctx context.Context, inc *instance, sandbox runtime.Sandbox) error {
	other, taken := d.plugin.owners.claim(sandbox)
	if !taken {
		return nil
	}
	// Container IDs, such as process IDs, may be reused.
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

// Stop calls the plugin's Stop.
func (d *Driver) Stop(ctx context.Context, sessionID string) error {
	_, err := call(ctx, d, func(inc *instance) (struct{}, error) {
		return struct{}{}, inc.driver.Stop(ctx, sessionID)
	})
	return err
}

// Delete calls the plugin's Delete.
func (d *Driver) Delete(ctx context.Context, sessionID string) error {
	_, err := call(ctx, d, func(inc *instance) (struct{}, error) {
		return struct{}{}, inc.driver.Delete(ctx, sessionID)
	})
	if err == nil {
		d.plugin.owners.release(sessionID)
	}
	return err
}

// Inspect refuses a sandbox whose container belongs to another session, as Create does.
func (d *Driver) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	return call(ctx, d, func(inc *instance) (runtime.Sandbox, error) {
		sandbox, err := inc.driver.Inspect(ctx, sessionID)
		if err != nil {
			return runtime.Sandbox{}, err
		}
		if err := d.checkOwner(ctx, inc, sandbox); err != nil {
			return runtime.Sandbox{}, err
		}
		return sandbox, nil
	})
}

// List records which container belongs to which session. It does not check for
// duplicates: the next Create or Inspect does.
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

// Watch waits until the plugin is up. It then reports changes until the plugin's
// process ends.
func (d *Driver) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	inc, err := d.plugin.await(ctx)
	if err != nil {
		return err
	}
	return d.plugin.wrap(inc.explain(ctx, inc.driver.Watch(ctx, changed)))
}

// Health returns an error if the plugin's process is not up, and otherwise the result
// of the plugin's own health check.
func (d *Driver) Health(ctx context.Context) error {
	_, err := call(ctx, d, func(inc *instance) (struct{}, error) {
		return struct{}{}, inc.driver.Health(ctx)
	})
	return err
}

// Logs yields the plugin's logs of a session.
func (d *Driver) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return each(ctx, d, func(inc *instance) iter.Seq2[runtime.LogChunk, error] {
		return inc.driver.Logs(ctx, sessionID, query)
	})
}

// Exec runs a command by the plugin's Exec. The plugin kills the command if this process
// dies.
func (d *Driver) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	return call(ctx, d, func(inc *instance) (int, error) {
		return inc.driver.Exec(ctx, sessionID, command, streams)
	})
}

// Explain returns what the plugin knows of a session's sandbox.
func (d *Driver) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	return call(ctx, d, func(inc *instance) ([]runtime.Happening, error) {
		return inc.driver.Explain(ctx, sessionID)
	})
}

// Claim refuses a sandbox whose container belongs to another session, as Create does. It
// waits at most 5 seconds.
func (d *Driver) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	return call(ctx, d, func(inc *instance) (runtime.Sandbox, error) {
		sandbox, err := inc.driver.Claim(ctx, spec)
		if err != nil {
			return runtime.Sandbox{}, err
		}
		if err := d.checkOwner(ctx, inc, sandbox); err != nil {
			return runtime.Sandbox{}, err
		}
		return sandbox, nil
	})
}
