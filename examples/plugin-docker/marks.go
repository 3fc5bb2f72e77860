package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/volume"
	"github.com/moby/moby/client"
)

// A mark records that a session ID is used up, or that a spare is claimed. It is an empty Docker volume, because the
// engine creates a volume atomically and without an image. It costs one directory.
type markKind string

const (
	markStopped markKind = "stopped" // Inspect and List return the sandbox
	markDeleted markKind = "deleted" // Inspect and List do not return it
	markClaimed markKind = "claimed" // of a spare, with what it was claimed for; it does not use up the ID
)

// deletedLife is how long the mark of a deleted sandbox is kept. No call takes that long.
const deletedLife = time.Hour

const (
	labelMark      = "bivouac.mark"
	labelContainer = "bivouac.container_id"
	labelReason    = "bivouac.reason"
)

func markName(sessionID string, kind markKind) string {
	return containerName(sessionID) + "." + string(kind)
}

// mark makes a mark, with what is known about the container. It does not change an
// existing mark.
func (d *driver) mark(ctx context.Context, sessionID string, kind markKind, of container.InspectResponse) error {
	if kind == markStopped {
		deleted, err := d.hasMark(ctx, sessionID, markDeleted)
		if deleted || err != nil {
			return err
		}
	}
	labels := map[string]string{labelInstance: d.instance, labelSession: sessionID, labelMark: string(kind)}
	if of.Config != nil {
		labels[labelChat] = of.Config.Labels[labelChat]
		labels[labelPool] = of.Config.Labels[labelPool]
		labels[labelContainer] = of.ID
		labels[labelReason] = d.sandbox(of).Reason
	}
	_, err := d.engine.VolumeCreate(ctx, client.VolumeCreateOptions{Name: markName(sessionID, kind), Labels: labels})
	return known(err)
}

// marked reports whether the session ID is used up.
func (d *driver) marked(ctx context.Context, sessionID string) (bool, error) {
	for _, kind := range []markKind{markStopped, markDeleted} {
		if has, err := d.hasMark(ctx, sessionID, kind); has || err != nil {
			return has, err
		}
	}
	return false, nil
}

func (d *driver) hasMark(ctx context.Context, sessionID string, kind markKind) (bool, error) {
	_, err := d.findMark(ctx, sessionID, kind)
	if errors.Is(err, runtime.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// findMark returns a mark. It returns an error if the mark belongs to another Bivouac
// instance.
func (d *driver) findMark(ctx context.Context, sessionID string, kind markKind) (volume.Volume, error) {
	found, err := d.engine.VolumeInspect(ctx, markName(sessionID, kind), client.VolumeInspectOptions{})
	switch {
	case err != nil:
		return volume.Volume{}, known(err)
	case !d.owns(sessionID, found.Volume.Labels):
		return volume.Volume{}, fmt.Errorf("%w: volume %s does not belong to instance %s", runtime.ErrConflict, markName(sessionID, kind), d.instance)
	}
	return found.Volume, nil
}

func (d *driver) unmark(ctx context.Context, sessionID string, kind markKind) error {
	_, err := d.engine.VolumeRemove(ctx, markName(sessionID, kind), client.VolumeRemoveOptions{})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return known(err)
}

// stopped returns the sandbox of a mark.
func (d *driver) stopped(ctx context.Context, sessionID string) (runtime.Sandbox, error) {
	found, err := d.findMark(ctx, sessionID, markStopped)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	return stoppedSandbox(found), nil
}

func stoppedSandbox(mark volume.Volume) runtime.Sandbox {
	reason := mark.Labels[labelReason]
	if reason == "" {
		reason = "stopped"
	}
	return runtime.Sandbox{
		SessionID:   mark.Labels[labelSession],
		ChatID:      mark.Labels[labelChat],
		Pool:        mark.Labels[labelPool],
		ContainerID: mark.Labels[labelContainer],
		State:       runtime.StateDead,
		Reason:      reason,
	}
}

// allStopped yields the sandboxes of which only a mark is left, and removes old marks of
// deleted ones.
func (d *driver) allStopped(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) {
		marks, err := d.engine.VolumeList(ctx, client.VolumeListOptions{Filters: d.own()})
		if err != nil {
			yield(runtime.Sandbox{}, known(err))
			return
		}
		for _, mark := range marks.Items {
			var err error
			switch markKind(mark.Labels[labelMark]) {
			case markStopped:
				if !yield(stoppedSandbox(mark), nil) {
					return
				}
			case markDeleted:
				err = d.expire(ctx, mark)
			case markClaimed:
				err = d.forget(ctx, mark)
			}
			if err != nil { // the next List tries again
				d.logger.Warn("mark_not_removed", "volume", mark.Name, "error", err)
			}
		}
	}
}

// expire removes the mark of a sandbox that was deleted long ago.
func (d *driver) expire(ctx context.Context, mark volume.Volume) error {
	made, err := time.Parse(time.RFC3339, mark.CreatedAt)
	if err != nil || time.Since(made) < d.markLife {
		return nil //nolint:nilerr // keep a mark whose age is unknown
	}
	return d.unmark(ctx, mark.Labels[labelSession], markDeleted)
}

// forget removes the mark of a claimed spare whose container is gone: its Claim was
// interrupted just after a Delete.
func (d *driver) forget(ctx context.Context, mark volume.Volume) error {
	sessionID := mark.Labels[labelSession]
	if _, err := d.inspect(ctx, sessionID); !errors.Is(err, runtime.ErrNotFound) {
		return err
	}
	return d.unmark(ctx, sessionID, markClaimed)
}
