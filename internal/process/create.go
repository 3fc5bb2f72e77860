package process

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/bivouac/bivouac/runtime"
)

// Create starts the sandbox and waits until it answers.
func (d *Driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	sb, err := d.create(ctx, spec, progress)
	return handOut("create", spec, sb, err)
}

// handOut returns a sandbox that has answered, or why an operation has none to return.
func handOut(operation string, spec runtime.Spec, sb *sandbox, err error) (runtime.Sandbox, error) {
	if err != nil {
		return runtime.Sandbox{}, fmt.Errorf("process: %s %s: %w", operation, spec.SessionID, err)
	}
	now := sb.view()
	if now.State != runtime.StateRunning { // it ended just after it had answered
		return runtime.Sandbox{}, fmt.Errorf("process: %s %s: %w: it is %s: %s", operation, spec.SessionID, runtime.ErrNotReady, now.State, now.Reason)
	}
	return now, nil
}

func (d *Driver) create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (*sandbox, error) {
	if err := d.checkSpec(spec); err != nil {
		return nil, err
	}
	sb, err := d.intend(ctx, spec)
	if err != nil {
		return nil, err
	}
	select {
	case sb.creating <- struct{}{}:
		defer func() { <-sb.creating }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	progress(runtime.StagePlaced)
	if err := d.launch(ctx, sb); err != nil {
		return nil, err
	}
	progress(runtime.StageStarted)
	if err := d.awaitReady(ctx, sb); err != nil {
		return nil, err
	}
	d.notify(spec.SessionID)
	progress(runtime.StageReady)
	return sb, nil
}

// intend returns the sandbox of the spec, and adds it if there is none. The sandbox may
// or may not have been started.
func (d *Driver) intend(ctx context.Context, spec runtime.Spec) (*sandbox, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed.Load() {
		return nil, fmt.Errorf("%w: the driver is closed", runtime.ErrUnavailable)
	}
	if _, gone := d.gone[spec.SessionID]; gone {
		return nil, fmt.Errorf("%w: it was deleted", runtime.ErrConflict)
	}
	if sb, ok := d.sandboxes[spec.SessionID]; ok {
		if !sameSpec(sb.spec, spec) {
			return nil, fmt.Errorf("%w: it was created with another spec", runtime.ErrConflict)
		}
		return sb, nil
	}
	port, err := d.freePort(ctx)
	if err != nil {
		return nil, err
	}
	sb := newSandbox(spec, port)
	d.sandboxes[spec.SessionID] = sb
	d.ports[port] = struct{}{}
	return sb, nil
}

// Sandboxes get ports from 10000 to 19999. That is below the range that kernels use for
// outgoing connections. Otherwise such a connection, even the one that checks whether
// the sandbox is ready, could hold the port when the sandbox wants it. It is also below
// the ports that Nomad assigns, which begin at 20000.
const (
	minPort, ports uint16 = 10000, 10000

	portTries = 200
)

// freePort returns a port on which nothing listens. Another program may take it before
// the sandbox does. The sandbox then fails to start. The caller must hold d.mu.
func (d *Driver) freePort(ctx context.Context) (uint16, error) {
	for range portTries {
		port := minPort + rand.N(ports)
		if _, taken := d.ports[port]; taken {
			continue
		}
		listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if err != nil {
			continue // another program has it
		}
		if err := listener.Close(); err != nil {
			return 0, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
		}
		return port, nil
	}
	return 0, fmt.Errorf("%w: no free port among %d to %d was found", runtime.ErrNotPlaced, minPort, minPort+ports-1)
}

// gate is a shell script that waits for a line before it becomes the command. The line
// is sent once the PID is recorded. If the server dies before that, the shell reads the
// end of the file and exits. EndLeftovers therefore knows every process that runs.
const gate = `read -r go && exec "$@" </dev/null`

// launch starts the sandbox's process, unless it was started before.
func (d *Driver) launch(ctx context.Context, sb *sandbox) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.stopped {
		return errStopped
	}
	if sb.leader.PID != 0 || sb.ended {
		return nil
	}
	cmd, open, err := d.startGated(ctx, sb)
	if err != nil {
		return fmt.Errorf("%w: start: %w", runtime.ErrNotReady, err)
	}
	started := leader{PID: cmd.Process.Pid}
	started.Start, _ = startOf(started.PID) // it exists: it is a child and not collected yet
	if err := d.save(sb.spec.SessionID, started); err != nil {
		// The gate stays shut, so the shell exits by itself.
		err = errors.Join(err, open.Close())
		_ = cmd.Wait() // its exit status does not matter
		return err
	}
	sb.leader = started
	sb.note("process %d started on port %d: %s", started.PID, sb.port, d.command[0])
	_, err = open.Write([]byte("go\n"))
	// If the gate did not open, the process ends. Nothing waits for this goroutine: it
	// lasts as long as the sandbox, which outlives the driver.
	go d.reap(sb, cmd) //nolint:contextcheck // the sandbox outlives the call that starts it
	if err = errors.Join(err, open.Close()); err != nil {
		return fmt.Errorf("%w: start: %w", runtime.ErrNotReady, err)
	}
	return nil
}

// startGated starts the process behind its gate. The gate opens when a line is written
// to the returned file.
func (d *Driver) startGated(ctx context.Context, sb *sandbox) (*exec.Cmd, *os.File, error) {
	if sb.isSpare() {
		if err := d.makeSpareFolder(sb); err != nil {
			return nil, nil, err
		}
	}
	output := map[runtime.LogStream]*os.File{}
	defer func() { // the process has its own copies
		for _, file := range output {
			_ = file.Close()
		}
	}()
	for stream, log := range sb.logs {
		file, err := d.folder.OpenFile(log.name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return nil, nil, err
		}
		output[stream] = file
	}
	wait, open, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = wait.Close() }() // as above

	// The sandbox must outlive the request that creates it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "/bin/sh", append([]string{"-c", gate, "sh"}, d.command...)...)
	cmd.Dir = d.workspace(sb)
	cmd.Env = append(d.environment(sb), mark(d.dir, sb.spec.SessionID))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = wait, output[runtime.Stdout], output[runtime.Stderr]
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, nil, errors.Join(err, open.Close())
	}
	return cmd, open, nil
}

// Environment returns the variables that a sandbox inherits from this process: what any
// program needs, but no tokens.
func Environment() map[string]string {
	env := map[string]string{}
	for _, name := range []string{"PATH", "HOME", "LANG", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env[name] = value
		}
	}
	return env
}

// environment returns a sandbox's complete environment except for its mark. That of a
// spare is the same before and after its claim.
func (d *Driver) environment(sb *sandbox) []string {
	var env []string
	for name, value := range Environment() {
		env = append(env, name+"="+value)
	}
	env = append(env,
		"PORT="+strconv.Itoa(int(sb.port)),
		"BIVOUAC_SESSION_ID="+sb.spec.SessionID,
		"BIVOUAC_WORKSPACE="+d.workspace(sb),
		"BIVOUAC_ACCESS_TOKEN="+string(sb.spec.AccessToken),
	)
	if sb.isSpare() {
		return append(env, "BIVOUAC_SESSION_FILE="+d.sparePath(sb, sessionFile))
	}
	return append(env, "BIVOUAC_CHAT_ID="+sb.spec.ChatID, "BIVOUAC_AGENT_ID="+sb.spec.AgentID)
}

var errStopped = fmt.Errorf("%w: it was stopped", runtime.ErrConflict)

// awaitReady waits until the sandbox answers, ends, or takes too long.
func (d *Driver) awaitReady(ctx context.Context, sb *sandbox) error {
	if sb.view().State == runtime.StateStarting {
		wait, cancel := context.WithTimeout(ctx, readyLimit)
		defer cancel()
		defer context.AfterFunc(sb.running, cancel)()
		if err := readyCheck().Wait(wait, sb.endpoint(), sb.spec.SessionID); err != nil && sb.running.Err() == nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
	}

	sb.mu.Lock()
	defer sb.mu.Unlock()
	switch {
	case sb.stopped:
		return errStopped
	case sb.ended:
		return fmt.Errorf("%w: %s: %s", runtime.ErrNotReady, sb.reason, sb.spec.AccessToken.HideIn(d.lastWords(ctx, sb)))
	}
	if !sb.ready {
		sb.note("it answers at %s", sb.endpoint().AddrPort())
	}
	sb.ready = true
	return nil
}
