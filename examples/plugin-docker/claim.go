package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

const (
	sessionFolder = "/run/bivouac"  // where the file with the session is, inside
	sessionName   = "session.json"  // of that file
	emptyFolder   = "ro,mode=0755"  // the folder of the file, before the claim
	claimLimit    = 3 * time.Second // from the claim to the sandbox's answer
)

// Claim gives a spare to a chat: it mounts the volume and a file with the session into the
// running container. The mounts are seen in the container only, and go with it.
//
// A mark records the chat before that. The engine makes a mark once, so two claims cannot
// both succeed, and a claim that was interrupted can be repeated. The labels of a container
// cannot change. So Inspect and List describe a claimed spare as a spare.
func (d *driver) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	if spec.Pool != "" {
		return runtime.Sandbox{}, fmt.Errorf("%w: a claim is for a chat, not for pool %q", runtime.ErrInvalid, spec.Pool)
	}
	spare, err := d.inspect(ctx, spec.SessionID)
	switch {
	case err != nil:
		return runtime.Sandbox{}, err
	case spare.Config.Labels[labelPool] == "":
		return runtime.Sandbox{}, fmt.Errorf("%w: container %s is not a spare", runtime.ErrConflict, containerName(spec.SessionID))
	}
	if err := d.take(ctx, spec); err != nil {
		return runtime.Sandbox{}, err
	}
	if now := d.sandbox(spare); now.State != runtime.StateRunning {
		return runtime.Sandbox{}, fmt.Errorf("%w: its container is %s: %s", runtime.ErrNotReady, now.State, now.Reason)
	}
	if err := bind(spare, spec); err != nil {
		return runtime.Sandbox{}, err
	}
	claimed, err := d.awaitReady(ctx, spec.SessionID, spare.ID, claimLimit)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	claimed.ChatID = spec.ChatID
	return claimed, nil
}

// take makes the mark that the spare is for this chat.
func (d *driver) take(ctx context.Context, spec runtime.Spec) error {
	labels := d.labels(spec)
	labels[labelMark] = string(markClaimed)
	if _, err := d.engine.VolumeCreate(ctx, client.VolumeCreateOptions{Name: markName(spec.SessionID, markClaimed), Labels: labels}); err != nil {
		return known(err)
	}
	mark, err := d.findMark(ctx, spec.SessionID, markClaimed)
	switch {
	case errors.Is(err, runtime.ErrNotFound): // Delete removed it
		return fmt.Errorf("%w: session %s was stopped", runtime.ErrConflict, spec.SessionID)
	case err != nil:
		return err
	case !isFor(mark.Labels, spec):
		return fmt.Errorf("%w: session %s was claimed with another spec", runtime.ErrConflict, spec.SessionID)
	}
	// Delete makes its mark before it removes this one, so one of both sees the other.
	switch stopped, err := d.marked(ctx, spec.SessionID); {
	case err != nil:
		return err
	case stopped:
		return errors.Join(fmt.Errorf("%w: session %s was stopped", runtime.ErrConflict, spec.SessionID), d.unmark(ctx, spec.SessionID, markClaimed))
	}
	return nil
}

// canBind refuses to keep a spare that could not get a volume later.
func canBind(spare container.InspectResponse) error {
	if err := inside(spare, func(string) error { return nil }); err != nil {
		return fmt.Errorf("%w: the plugin cannot give a volume to a spare, so it must run as root on the engine's machine: %w", runtime.ErrInvalid, err)
	}
	return nil
}
