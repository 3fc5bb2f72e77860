package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
	"github.com/containerd/errdefs"
	"github.com/hashicorp/go-hclog"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

const (
	workspace  = "/workspace"         // where the volume is, inside
	readyLimit = time.Minute          // from the container's start to its answer
	stopGrace  = 5                    // seconds from SIGTERM to SIGKILL
	logSize    = "1m"                 // size of a log file; two are kept of each sandbox
	tmpSize    = "size=64m,mode=1777" // of /tmp; everything else but the volume is read-only
)

// The labels of a container. The driver finds its own containers by them.
const (
	labelInstance = "bivouac.instance"
	labelSession  = "bivouac.session_id"
	labelChat     = "bivouac.chat_id"
	labelAgent    = "bivouac.agent_id"
	labelVolume   = "bivouac.volume_host_path"
	labelPool     = "bivouac.pool" // of a spare, instead of the three before
)

// driver keeps its state in the engine and not in memory. So it finds its sandboxes again
// after a crash, and several drivers may run.
//
// Two rules make sure that a sandbox starts once, and never after its stop. First, the
// name of its container is made from the session ID, and the engine accepts a name only
// once. Second, Stop leaves a mark before it looks for a container, and Create looks for a
// mark after it made the container and before it starts it. Whichever comes first, one of
// them sees the other.
type driver struct {
	logger   hclog.Logger
	config   config
	instance string
	engine   *client.Client
	ready    ready.Check
	markLife time.Duration // how long the mark of a deleted sandbox is kept
}

func containerName(sessionID string) string { return "bivouac-" + sessionID }

// Create starts a container and waits until it answers.
func (d *driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if err := d.make(ctx, spec); err != nil {
		return runtime.Sandbox{}, err
	}
	made, err := d.inspect(ctx, spec.SessionID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	if !isFor(made.Config.Labels, spec) {
		return runtime.Sandbox{}, fmt.Errorf("%w: container %s was made for another spec", runtime.ErrConflict, containerName(spec.SessionID))
	}
	progress(runtime.StagePlaced)

	switch marked, err := d.marked(ctx, spec.SessionID); {
	case err != nil:
		return runtime.Sandbox{}, err
	case marked:
		err := d.remove(ctx, made.ID)
		return runtime.Sandbox{}, errors.Join(fmt.Errorf("%w: session %s was stopped", runtime.ErrConflict, spec.SessionID), err)
	}
	if made.State.Status == container.StateCreated {
		if _, err := d.engine.ContainerStart(ctx, made.ID, client.ContainerStartOptions{}); err != nil {
			if errdefs.IsNotFound(err) {
				return runtime.Sandbox{}, fmt.Errorf("%w: session %s was stopped while it started", runtime.ErrConflict, spec.SessionID)
			}
			return runtime.Sandbox{}, fmt.Errorf("%w: start: %w", runtime.ErrNotReady, known(err))
		}
	}
	progress(runtime.StageStarted)

	sandbox, err := d.awaitReady(ctx, spec.SessionID, made.ID, readyLimit)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	if spec.Pool != "" {
		if made, err = d.inspect(ctx, spec.SessionID); err != nil {
			return runtime.Sandbox{}, err
		}
		if err := canBind(made); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	progress(runtime.StageReady)
	d.logger.Debug("sandbox_ready", "session_id", spec.SessionID, "container_id", made.ID)
	return sandbox, nil
}

// make makes the container, or finds the existing one.
func (d *driver) make(ctx context.Context, spec runtime.Spec) error {
	switch marked, err := d.marked(ctx, spec.SessionID); {
	case err != nil:
		return err
	case marked:
		return fmt.Errorf("%w: session %s was stopped", runtime.ErrConflict, spec.SessionID)
	}
	port := network.MustParsePort(strconv.Itoa(int(d.config.Port)) + "/tcp")
	tmpfs := map[string]string{"/tmp": tmpSize}
	// A mount takes the path as it is; a bind string would split it at ':'.
	mounts := []mount.Mount{{Type: mount.TypeBind, Source: spec.VolumeHostPath, Target: workspace}}
	env := []string{"BIVOUAC_CHAT_ID=" + spec.ChatID, "BIVOUAC_AGENT_ID=" + spec.AgentID}
	if spec.Pool != "" { // its Claim covers both folders
		tmpfs[workspace], tmpfs[sessionFolder] = tmpSize, emptyFolder
		mounts, env = nil, []string{"BIVOUAC_SESSION_FILE=" + sessionFolder + "/" + sessionName}
	}
	_, err := d.engine.ContainerCreate(ctx, client.ContainerCreateOptions{
		Name: containerName(spec.SessionID),
		Config: &container.Config{
			Image: d.config.Image,
			Cmd:   d.config.Command,
			Env: append(env,
				"BIVOUAC_SESSION_ID="+spec.SessionID,
				"BIVOUAC_WORKSPACE="+workspace,
				"BIVOUAC_ACCESS_TOKEN="+string(spec.AccessToken),
				"BIVOUAC_BIND=0.0.0.0",
				"PORT="+strconv.Itoa(int(d.config.Port)),
			),
			ExposedPorts: network.PortSet{port: {}},
			Labels:       d.labels(spec),
		},
		HostConfig: &container.HostConfig{
			Mounts:         mounts,
			NetworkMode:    container.NetworkMode(d.config.Network),
			PortBindings:   network.PortMap{port: {{HostIP: netip.MustParseAddr("127.0.0.1")}}},
			CapDrop:        []string{"ALL"},
			SecurityOpt:    []string{"no-new-privileges"},
			ReadonlyRootfs: true,
			Tmpfs:          tmpfs,
			RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
			LogConfig:      container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": logSize, "max-file": "2"}},
			Resources: container.Resources{
				Memory:     d.config.MemoryMiB << 20,
				MemorySwap: d.config.MemoryMiB << 20, // no swap on top
				NanoCPUs:   int64(d.config.CPUs * 1e9),
				PidsLimit:  &d.config.PIDs,
			},
		},
	})
	switch {
	case err == nil, errdefs.IsConflict(err): // the name is taken: by an earlier try
		return nil
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w: image %s is not on this engine", runtime.ErrNotPlaced, d.config.Image)
	case errdefs.IsInvalidArgument(err):
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	return known(err)
}

// labels returns what a spec is recorded as.
func (d *driver) labels(spec runtime.Spec) map[string]string {
	return map[string]string{
		labelInstance: d.instance,
		labelSession:  spec.SessionID,
		labelChat:     spec.ChatID,
		labelAgent:    spec.AgentID,
		labelVolume:   spec.VolumeHostPath,
		labelPool:     spec.Pool,
	}
}

// isFor reports whether labels are of this spec.
func isFor(labels map[string]string, spec runtime.Spec) bool {
	return labels[labelChat] == spec.ChatID && labels[labelAgent] == spec.AgentID &&
		labels[labelVolume] == spec.VolumeHostPath && labels[labelPool] == spec.Pool
}

// awaitReady waits until the sandbox answers, or its container has ended.
func (d *driver) awaitReady(ctx context.Context, sessionID, containerID string, limit time.Duration) (runtime.Sandbox, error) {
	running, err := d.inspect(ctx, sessionID)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	if now := d.sandbox(running); now.State == runtime.StateDead { // it has no endpoint then
		return runtime.Sandbox{}, fmt.Errorf("%w: its container has ended: %s", runtime.ErrNotReady, now.Reason)
	}
	waiting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ended := d.engine.ContainerWait(waiting, containerID, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		err = d.ready.Wait(waiting, endpointOf(running, d.config.Port), sessionID)
	}()
	select {
	case <-answered:
	case <-ended.Result:
		cancel()
		<-answered
		found, err := d.Inspect(ctx, sessionID)
		if err != nil {
			return runtime.Sandbox{}, fmt.Errorf("%w: its container is gone: %w", runtime.ErrNotReady, err)
		}
		return runtime.Sandbox{}, fmt.Errorf("%w: its container has ended: %s", runtime.ErrNotReady, found.Reason)
	}
	switch {
	case ctx.Err() != nil:
		return runtime.Sandbox{}, ctx.Err()
	case err != nil:
		return runtime.Sandbox{}, err
	}
	made, err := d.Inspect(ctx, sessionID)
	if err == nil && made.State != runtime.StateRunning {
		err = fmt.Errorf("%w: its container has ended: %s", runtime.ErrNotReady, made.Reason)
	}
	return made, err
}

// Stop makes a mark that can be inspected, and then stops the container, which stays for its
// output. A container that was never started, or only in the meantime, is removed.
func (d *driver) Stop(ctx context.Context, sessionID string) error {
	if err := d.end(ctx, sessionID, markStopped); err != nil {
		return err
	}
	found, err := d.inspect(ctx, sessionID)
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		return nil
	case err != nil:
		return err
	case d.sandbox(found).State == runtime.StateDead:
		return nil
	}
	return d.remove(ctx, found.ID)
}

// Delete makes a mark that Inspect and List do not return, and then removes everything
// else.
func (d *driver) Delete(ctx context.Context, sessionID string) error {
	if err := d.end(ctx, sessionID, markDeleted); err != nil {
		return err
	}
	if err := d.remove(ctx, containerName(sessionID)); err != nil {
		return err
	}
	return errors.Join(d.unmark(ctx, sessionID, markStopped), d.unmark(ctx, sessionID, markClaimed))
}

func (d *driver) end(ctx context.Context, sessionID string, mark markKind) error {
	found, err := d.inspect(ctx, sessionID)
	if err != nil && !errors.Is(err, runtime.ErrNotFound) {
		return err
	}
	if _, err := d.marked(ctx, sessionID); err != nil { // such as a mark of another instance
		return err
	}
	if err := d.mark(ctx, sessionID, mark, found); err != nil {
		return err
	}
	// The mark exists now, so no new container starts. One that was made in the
	// meantime has the same name.
	grace := stopGrace
	_, err = d.engine.ContainerStop(ctx, containerName(sessionID), client.ContainerStopOptions{Timeout: &grace})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return known(err)
}

// remove ends and removes a container, and waits until it is gone.
func (d *driver) remove(ctx context.Context, containerID string) error {
	gone := d.engine.ContainerWait(ctx, containerID, client.ContainerWaitOptions{Condition: container.WaitConditionRemoved})
	_, err := d.engine.ContainerRemove(ctx, containerID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil && !errdefs.IsConflict(err): // a conflict means that it is being removed
		return known(err)
	}
	select {
	case <-gone.Result:
		return nil
	case err := <-gone.Error:
		if errdefs.IsNotFound(err) {
			return nil
		}
		return known(err)
	}
}

// known wraps the engine's errors in the runtime's errors.
func known(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w: %w", runtime.ErrNotFound, err)
	}
	return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
}
