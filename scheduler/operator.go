package scheduler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// AdoptResult is the result of [Scheduler.Adopt]: what it did with the sandboxes that
// had no record.
type AdoptResult struct {
	Adopted []Session
	Left    []Orphan // stopped or left alone, with the reason
}

// Adopt handles all sandboxes without a record at once, as the leader does after a
// while: it writes new records for those that lost theirs, and stops those whose chat
// has another session. It returns an error if a runtime could not be read; then nothing
// was changed in that runtime.
func (s *Scheduler) Adopt(ctx context.Context) (AdoptResult, error) {
	if err := CallerFrom(ctx).MayOperate(LevelWrite); err != nil {
		return AdoptResult{}, fmt.Errorf("adopt: %w", err)
	}
	var res AdoptResult
	var failed []error
	for _, name := range slices.Sorted(maps.Keys(s.Drivers)) {
		r := reconciler{s: s, name: name, driver: s.Drivers[name]}
		c, err := r.compare(ctx)
		if err != nil {
			failed = append(failed, fmt.Errorf("adopt: runtime %s: %w", name, err))
			continue
		}
		adopted, left := s.resolveAll(ctx, c.orphans, passLockWait)
		res.Adopted = append(res.Adopted, adopted...)
		res.Left = append(res.Left, left...)
	}
	return res, errors.Join(failed...)
}

// RepairResult is the result of [Scheduler.Repair].
type RepairResult struct {
	Result  RepairOutcome
	Session *Session // the chat's session, nil after RepairRemoved
}

// RepairOutcome is what a repair did.
type RepairOutcome string

// The outcomes of a repair.
const (
	RepairIntact  RepairOutcome = "intact"  // nothing was wrong with the record
	RepairAdopted RepairOutcome = "adopted" // the record was written again from the chat's sandbox
	RepairRemoved RepairOutcome = "removed" // the chat has no session any more
)

// Repair repairs a chat's record that cannot be read, or whose session is not alive or
// belongs to another chat. If a sandbox of the chat runs, Repair writes the record again
// from what the sandbox was created with. Otherwise it removes an unusable record. It
// stops a sandbox of the chat that cannot be adopted, because no record could name it.
// It returns ErrNotFound if there is neither a record nor a sandbox.
func (s *Scheduler) Repair(ctx context.Context, chatID uuid.UUID) (RepairResult, error) {
	res, err := s.repair(ctx, chatID)
	if err != nil {
		err = fmt.Errorf("repair: %w", err)
		s.journal.note(ctx, Event{Type: EventRepairFailed, ChatID: chatID, Err: err})
		return RepairResult{}, err
	}
	s.journal.note(ctx, Event{Type: EventRepaired, ChatID: chatID, Reason: string(res.Result)})
	return res, nil
}

func (s *Scheduler) repair(ctx context.Context, chatID uuid.UUID) (RepairResult, error) {
	if err := CallerFrom(ctx).MayOperate(LevelWrite); err != nil {
		return RepairResult{}, err
	}
	if err := checkChatID(chatID); err != nil {
		return RepairResult{}, err
	}
	lease, err := s.Locker.Lock(ctx, chatID, LockWait)
	unusable := errors.Is(err, ErrDamaged)
	if unusable {
		lease, err = s.Locker.LockDamaged(ctx, chatID, LockWait)
	}
	if err != nil {
		return RepairResult{}, err
	}
	defer s.release(ctx, lease)
	ctx, done := s.underLock(ctx, lease)
	defer done()

	reclaimed, err := s.reclaim(ctx, lease, chatID, s.allFinders())
	if err != nil {
		return RepairResult{}, err
	}
	current := lease.Session()
	if current != nil && !reclaimed.adopted {
		driver, err := s.driver(current.Runtime)
		if err != nil {
			return RepairResult{}, err
		}
		_, err = isKnown(ctx, driver, *current)
		if unusable = errors.Is(err, ErrDamaged); err != nil && !unusable {
			return RepairResult{}, err
		}
	}
	switch {
	case reclaimed.adopted:
		return RepairResult{Result: RepairAdopted, Session: current}, nil
	case unusable:
		removed := Session{ChatID: chatID}
		if current != nil {
			removed = *current
		}
		if err := write(ctx, lease, nil, Release, s.change(ctx, ChangeRepaired, removed, "its record was unusable and was removed")); err != nil {
			return RepairResult{}, fmt.Errorf("remove the record: %w", err)
		}
		return RepairResult{Result: RepairRemoved}, nil
	case current == nil:
		return RepairResult{}, ErrNotFound
	default:
		return RepairResult{Result: RepairIntact, Session: current}, nil
	}
}

// allFinders returns a finder for each driver. Drivers that are not a ChatFinder list all
// their sandboxes.
func (s *Scheduler) allFinders() []finder {
	finders := s.chatFinders()
	for _, name := range slices.Sorted(maps.Keys(s.Drivers)) {
		driver := s.Drivers[name]
		if _, ok := driver.(runtime.ChatFinder); ok {
			continue
		}
		finders = append(finders, finder{name, driver, func(ctx context.Context, chatID, except string) ([]runtime.Sandbox, error) {
			var sandboxes []runtime.Sandbox
			for sandbox, err := range driver.List(ctx) {
				if err != nil {
					return nil, err
				}
				if sandbox.ChatID == chatID && sandbox.SessionID != except && sandbox.State != runtime.StateDead {
					sandboxes = append(sandboxes, sandbox)
				}
			}
			return sandboxes, nil
		}})
	}
	return finders
}
