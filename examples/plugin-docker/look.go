package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"strconv"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

// Inspect returns the container, or the mark of Stop if there is no container.
func (d *driver) Inspect(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	found, err := d.inspect(ctx, sessionID)
	if errors.Is(err, runtime.ErrNotFound) {
		return d.stopped(ctx, sessionID)
	}
	if err != nil {
		return runtime.Sandbox{}, err
	}
	// A stopped container is kept for its output until it is deleted.
	return d.sandbox(found), nil
}

// Explain tells what the engine knows of the container.
func (d *driver) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	found, err := d.inspect(ctx, sessionID)
	if errors.Is(err, runtime.ErrNotFound) {
		stopped, err := d.stopped(ctx, sessionID)
		return []runtime.Happening{{Text: stopped.Reason}}, err
	}
	if err != nil {
		return nil, err
	}
	var told []runtime.Happening
	tell := func(at, text string) {
		if when, err := time.Parse(time.RFC3339, at); err == nil && !when.IsZero() {
			told = append(told, runtime.Happening{Time: when, Text: text})
		}
	}
	tell(found.Created, "container made from image "+found.Config.Image)
	tell(found.State.StartedAt, "container started")
	if mark, err := d.findMark(ctx, sessionID, markClaimed); err == nil {
		tell(mark.CreatedAt, "spare of pool "+found.Config.Labels[labelPool]+" claimed for chat "+mark.Labels[labelChat])
	}
	if now := d.sandbox(found); now.State == runtime.StateDead {
		tell(found.State.FinishedAt, "container ended: "+now.Reason)
	}
	return told, nil
}

// inspect returns the session's container. It returns an error if the container belongs
// to another Bivouac instance or to somebody else.
func (d *driver) inspect(ctx context.Context, sessionID string) (container.InspectResponse, error) {
	found, err := d.engine.ContainerInspect(ctx, containerName(sessionID), client.ContainerInspectOptions{})
	switch {
	case err != nil:
		return container.InspectResponse{}, known(err)
	case found.Container.State == nil || found.Container.Config == nil:
		return container.InspectResponse{}, fmt.Errorf("%w: the engine returns no details of container %s", runtime.ErrUnavailable, found.Container.ID)
	case !d.owns(sessionID, found.Container.Config.Labels):
		return container.InspectResponse{}, fmt.Errorf("%w: container %s does not belong to instance %s", runtime.ErrConflict, containerName(sessionID), d.instance)
	}
	return found.Container, nil
}

// owns reports whether an object with a session's name belongs to this Bivouac instance.
func (d *driver) owns(sessionID string, labels map[string]string) bool {
	return labels[labelInstance] == d.instance && labels[labelSession] == sessionID
}

// sandbox returns a container as a runtime.Sandbox.
func (d *driver) sandbox(c container.InspectResponse) runtime.Sandbox {
	sandbox := runtime.Sandbox{
		SessionID:   c.Config.Labels[labelSession],
		ChatID:      c.Config.Labels[labelChat],
		Pool:        c.Config.Labels[labelPool],
		ContainerID: c.ID,
		Endpoint:    endpointOf(c, d.config.Port),
	}
	switch c.State.Status {
	case container.StateCreated:
		sandbox.State = runtime.StateStarting
	case container.StateRunning, container.StatePaused, container.StateRestarting:
		sandbox.State = runtime.StateRunning
	case container.StateExited, container.StateDead:
		sandbox.State = runtime.StateDead
		sandbox.Reason = fmt.Sprintf("exit code %d", c.State.ExitCode)
		if c.State.OOMKilled {
			sandbox.Reason += ", out of memory"
		}
		if c.State.Error != "" {
			sandbox.Reason += ": " + c.State.Error
		}
	default:
		sandbox.State = runtime.StateLost
		sandbox.Reason = "its container is " + string(c.State.Status)
	}
	return sandbox
}

// endpointOf returns the address at which the container's port is published, or zero if
// the container does not run.
func endpointOf(c container.InspectResponse, port uint16) runtime.Endpoint {
	if c.NetworkSettings == nil {
		return runtime.Endpoint{}
	}
	for _, binding := range c.NetworkSettings.Ports[network.MustParsePort(strconv.Itoa(int(port))+"/tcp")] {
		if n, err := strconv.ParseUint(binding.HostPort, 10, 16); err == nil && binding.HostIP.Is4() {
			return runtime.Endpoint{IP: netip.AddrFrom4(binding.HostIP.As4()), Port: uint16(n)}
		}
	}
	return runtime.Endpoint{}
}

// own returns a filter for the objects of this Bivouac instance.
func (d *driver) own() client.Filters {
	return make(client.Filters).Add("label", labelInstance+"="+d.instance, labelSession)
}

// List yields the containers and then the marks of stopped sandboxes. It also removes old
// marks of deleted ones.
func (d *driver) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		all, err := d.engine.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: d.own()})
		if err != nil {
			yield(runtime.Sandbox{}, known(err))
			return
		}
		listed := map[string]bool{}
		for _, summary := range all.Items {
			sandbox, err := d.Inspect(ctx, summary.Labels[labelSession])
			if errors.Is(err, runtime.ErrNotFound) || errors.Is(err, runtime.ErrConflict) {
				continue // it has been removed, or its labels are wrong
			}
			if !yield(sandbox, err) || err != nil {
				return
			}
			listed[sandbox.SessionID] = true
		}
		for sandbox, err := range d.allStopped(ctx) {
			if err == nil && listed[sandbox.SessionID] {
				continue
			}
			if !yield(sandbox, err) {
				return
			}
		}
	}
}

// Watch reports the containers that end, from the engine's events.
func (d *driver) Watch(ctx context.Context, changed func(runtime.Sandbox)) error {
	news := d.engine.Events(ctx, client.EventsListOptions{
		Filters: d.own().Add("type", string(events.ContainerEventType)).Add("event", string(events.ActionDie)),
	})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-news.Err:
			return known(err)
		case event := <-news.Messages:
			sandbox, err := d.Inspect(ctx, event.Actor.Attributes[labelSession])
			if errors.Is(err, runtime.ErrNotFound) {
				continue // deleted
			}
			if err != nil {
				return err
			}
			changed(sandbox)
		}
	}
}
