package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
)

// Running is one plugin that is up, in a host of its own. It is for commands and tests that
// drive a plugin themselves. Its methods are not safe for concurrent use.
type Running struct {
	Driver *Driver

	config Config
	host   *Host
	end    func()
}

// Start starts a plugin in a host of its own and returns once it is up. It does not start
// the plugins of config. The plugin runs until End is called, even if ctx ends.
func Start(ctx context.Context, config Config, spec Plugin) (*Running, error) {
	config.Plugins = []Plugin{spec}
	r := &Running{config: config}
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *Running) start(ctx context.Context) error {
	host, err := New(r.config)
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	var hosts sync.WaitGroup
	hosts.Go(func() { host.Run(running) })
	r.host, r.Driver = host, host.Drivers()[r.config.Plugins[0].Name]
	r.end = func() {
		stop()
		hosts.Wait()
	}
	if err := host.AwaitStart(ctx); err != nil {
		r.end()
		return err
	}
	return nil
}

// End ends the plugin and waits until its process is gone. Its sandboxes keep running.
// End may be called more than once.
func (r *Running) End() { r.end() }

// Status returns the plugin's status.
func (r *Running) Status() Status { return r.host.Status()[0] }

// Kill sends SIGKILL to the plugin's process.
func (r *Running) Kill() error {
	pid := r.Status().PID
	if pid == 0 {
		return errors.New("the plugin is not up, so it cannot be killed")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the plugin: %w", err)
	}
	return nil
}

// Restart kills the plugin's process and starts the plugin in a new host, with a new
// Driver. The old host would pause before a restart, longer after each crash.
func (r *Running) Restart(ctx context.Context) error {
	if err := r.Kill(); err != nil {
		return err
	}
	r.end()
	if err := r.start(ctx); err != nil {
		return fmt.Errorf("the plugin did not come up again: %w", err)
	}
	return nil
}
