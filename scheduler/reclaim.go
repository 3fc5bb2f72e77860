package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// lateStart is how long after its session's creation a runtime must have registered a
// sandbox for the sandbox to count as late. A late sandbox comes from a start that
// arrived after the create had given up, and after the runtime had removed what should
// have refused it. No caller has received it. lateStart is far longer than
// operationLimit because it compares two clocks.
const lateStart = time.Hour

// found is a sandbox, and the runtime that runs it.
type found struct {
	runtime.Sandbox
	name   string // the runtime's name
	driver runtime.Driver
}

// session returns the session that the sandbox describes, without an access token: no
// driver reports it. An ID that is not a UUID becomes the nil UUID.
func (f found) session() *Session {
	sessionID, _ := uuid.Parse(f.SessionID)
	chatID, _ := uuid.Parse(f.ChatID)
	return &Session{
		SessionID:      sessionID,
		ChatID:         chatID,
		AgentID:        f.AgentID,
		VolumeHostPath: f.VolumeHostPath,
		Runtime:        f.name,
		ContainerID:    f.ContainerID,
		Endpoint:       f.Endpoint,
		CreatedAt:      f.CreatedAt,
		ExpiresAt:      f.ExpiresAt,
		Owner:          cmp.Or(f.Owner, DefaultOwner),
		Labels:         f.Labels,
		Warm:           f.Pool != "" && f.ChatID != "",
	}
}

// finder finds the sandboxes of a chat in one runtime. See [runtime.ChatFinder].
type finder struct {
	name   string
	driver runtime.Driver
	find   func(ctx context.Context, chatID, except string) ([]runtime.Sandbox, error)
}

// chatFinders returns a finder for each driver that can find a chat's sandboxes
// directly. Sandboxes of other drivers are known only from their records.
func (s *Scheduler) chatFinders() []finder {
	var finders []finder
	for _, name := range slices.Sorted(maps.Keys(s.Drivers)) {
		if f, ok := s.Drivers[name].(runtime.ChatFinder); ok {
			finders = append(finders, finder{name, s.Drivers[name], f.FindChat})
		}
	}
	return finders
}

// findOthers returns the chat's sandboxes that are not dead, newest first. It leaves
// out the sandbox of the recorded session, if there is one.
func findOthers(ctx context.Context, finders []finder, chatID uuid.UUID, recorded *Session) ([]found, error) {
	except := ""
	if recorded != nil {
		except = recorded.SessionID.String()
	}
	var others []found
	for _, f := range finders {
		sandboxes, err := f.find(ctx, chatID.String(), except)
		if err != nil {
			return nil, runtimeError(ctx, "find the chat's sandboxes in runtime "+f.name, err)
		}
		for _, sandbox := range sandboxes {
			others = append(others, found{sandbox, f.name, f.driver})
		}
	}
	slices.SortFunc(others, newestFirst)
	return others, nil
}

func newestFirst(a, b found) int {
	return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.SessionID, b.SessionID))
}

// reclaimed is the result of reclaim.
type reclaimed struct {
	adopted bool
	ended   []found
}

// reclaim brings the lease's record and the chat's sandboxes into agreement, before the
// session is created, replaced or ended.
//
// A sandbox may run although the record's own does not, for example if the store was
// restored from an old state or somebody edited a key. Such a sandbox has lost its
// record. reclaim adopts it: it writes the record again from what the sandbox reports
// about itself. reclaim ends all other sandboxes of the chat except the record's own.
// If the chat has no other sandboxes, reclaim only looks for them.
func (s *Scheduler) reclaim(ctx context.Context, lease Lease, chatID uuid.UUID, finders []finder) (done reclaimed, err error) {
	current := lease.Session()
	others, err := findOthers(ctx, finders, chatID, current)
	if err != nil || len(others) == 0 { // safeguard: look for a chat's sandboxes before a create
		return done, err
	}
	alive := false
	if current != nil {
		if alive, err = s.isAlive(ctx, *current); err != nil {
			return done, err
		}
	}
	lost := slices.IndexFunc(others, func(other found) bool { return whyNotAdopted(other.Sandbox) == nil })
	if !alive && lost >= 0 {
		if _, err := s.adopt(ctx, lease, others[lost], Keep); err != nil {
			return done, err
		}
		done.adopted, others = true, slices.Delete(others, lost, lost+1)
	}
	for _, other := range others {
		if err := s.endOrphan(ctx, lease, other); err != nil {
			return done, err
		}
		done.ended = append(done.ended, other)
	}
	return done, nil
}

// isAlive reports whether the record's own sandbox may still run: its driver knows it,
// it belongs to this chat, and it is not dead.
func (s *Scheduler) isAlive(ctx context.Context, session Session) (bool, error) {
	driver, err := s.driver(session.Runtime)
	if err != nil {
		return false, err
	}
	sandbox, known, err := inspect(ctx, driver, session)
	return known && sandbox.State != runtime.StateDead && !isOfAnotherChat(sandbox, session), err
}

// outlive makes sure that the session of a record cannot start or still run a sandbox,
// before another session takes the record over. The session's sandbox is not alive.
func (s *Scheduler) outlive(ctx context.Context, lease Lease, session Session) error {
	driver, err := s.driver(session.Runtime)
	if err != nil {
		return err
	}
	known, err := isKnown(ctx, driver, session)
	switch {
	case errors.Is(err, ErrDamaged):
		return nil // the sandbox belongs to another chat and keeps running
	case err != nil:
		return err
	case known && session.State != StateCreating:
		return nil // the driver has seen its end
	}
	return endSandbox(ctx, lease, driver, runtime.Driver.Delete, session, known)
}

// whyNotAdopted returns why no record can be written for a sandbox, or nil if one can.
func whyNotAdopted(sandbox runtime.Sandbox) error {
	_, err := uuid.Parse(sandbox.SessionID)
	switch {
	case err != nil:
		return fmt.Errorf("%w: its session ID %q is no UUID", ErrInvalid, sandbox.SessionID)
	case sandbox.AgentID == "" || sandbox.VolumeHostPath == "" || sandbox.CreatedAt.IsZero() || sandbox.ExpiresAt.IsZero():
		return fmt.Errorf("%w: its runtime does not say what it was created for", ErrInvalid)
	case isLate(sandbox):
		return fmt.Errorf("%w: it was started %s after its session was created, when nobody waited for it any more",
			ErrInvalid, sandbox.RegisteredAt.Sub(sandbox.CreatedAt).Round(time.Second))
	case sandbox.State != runtime.StateRunning:
		return fmt.Errorf("%w: it is %s", ErrNotRunning, sandbox.State)
	case sandbox.ContainerID == "" || !sandbox.Endpoint.IsValid():
		return fmt.Errorf("%w: its runtime does not say where it is reached", ErrNotRunning)
	}
	return nil
}

func isLate(sandbox runtime.Sandbox) bool {
	return !sandbox.CreatedAt.IsZero() && sandbox.RegisteredAt.Sub(sandbox.CreatedAt) > lateStart
}

// adopt writes the record of a sandbox that has none, from what the sandbox reports
// about itself. The record replaces that of a session which is not alive. A renewal may
// have been lost with the record, so the session lives for at least the default TTL from
// now.
func (s *Scheduler) adopt(ctx context.Context, lease Lease, sandbox found, then Then) (Session, error) {
	session := *sandbox.session()
	session.State = StateRunning
	if least := s.now().Add(s.TTL); least.After(session.ExpiresAt) {
		session.ExpiresAt = least
	}
	err := s.attempt(ctx, Event{Type: EventAdopted, After: &session}, func() error {
		changes := []Change{s.change(ctx, ChangeAdopted, session, "its record was missing")}
		if current := lease.Session(); current != nil {
			if err := s.outlive(ctx, lease, *current); err != nil {
				return err
			}
			changes = append([]Change{s.succession(ctx, *current)}, changes...)
		}
		return s.writeAdopted(ctx, lease, &session, then, changes)
	})
	if err != nil {
		return Session{}, fmt.Errorf("adopt session %s: %w", session.SessionID, err)
	}
	return session, nil
}

// writeAdopted writes the record of an adopted sandbox. If that was a spare, its old record
// may have returned with an old state of the store, and goes in the same step.
func (s *Scheduler) writeAdopted(ctx context.Context, lease Lease, session *Session, then Then, changes []Change) error {
	for tries := 0; session.Warm; tries++ {
		spare, _, err := s.Store.FindSpare(ctx, session.SessionID)
		if err != nil {
			return err
		}
		if spare == nil { // safeguard: end of a spare's record with its adoption
			break
		}
		err = lockLost(ctx, lease.Claim(ctx, session, *spare, changes...))
		if !errors.Is(err, ErrSpareTaken) || tries == maxClaims {
			return err
		}
	}
	return write(ctx, lease, session, then, changes...)
}

// endOrphan ends a sandbox that has no record.
func (s *Scheduler) endOrphan(ctx context.Context, lease Lease, orphan found) error {
	err := s.attempt(ctx, Event{Type: EventOrphanStopped, Before: orphan.session()}, func() error {
		return stop(ctx, lease, orphan.driver, runtime.Driver.Delete, orphan.SessionID)
	})
	if err == nil {
		s.noteChange(ctx, s.change(ctx, ChangeOrphanStopped, *orphan.session(), "no record names it"))
	}
	if err != nil {
		return fmt.Errorf("end session %s, which no record names: %w", orphan.SessionID, err)
	}
	return nil
}
