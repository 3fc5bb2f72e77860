package scheduler

import "context"

// Auditor writes down what happens. Package audit implements it.
type Auditor interface {
	// Note receives each event after it happened.
	Note(ctx context.Context, e Event)
	// Attempt is called before the scheduler does something that no caller asked for.
	// e is the event of its success: EventExpired, EventSettled, EventAdopted,
	// EventOrphanStopped, EventRunning, EventDead or EventLost. If Attempt returns an
	// error, which wraps ErrAuditUnavailable, it is not done. Otherwise done is called
	// with its result.
	Attempt(ctx context.Context, e Event) (done func(err error), err error)
}

// attempt does something that no caller asked for, unless the auditor refuses. e is the
// event of its success.
func (s *Scheduler) attempt(ctx context.Context, e Event, do func() error) error {
	done := func(error) {}
	if s.Audit != nil {
		var err error
		if done, err = s.Audit.Attempt(ctx, s.journal.stamp(ctx, e)); err != nil { // safeguard: audit before what nobody asked for
			return err
		}
	}
	err := do()
	done(err)
	if err == nil {
		s.journal.note(ctx, e)
	}
	return err
}
