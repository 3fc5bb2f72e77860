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

// AdoptResult says what became of the sandboxes that no record named.
type AdoptResult struct {
	Adopted []Session
	Left    []Orphan // stopped or left alone, with the reason
}

// Adopt does at once what the leading replica does after a while about all
// sandboxes that no record names: it makes records of those that lost theirs,
// and stops what is second to a chat's session. The error is for reads that
// failed; then nothing was changed in the runtime that it names.
func (s *Scheduler) Adopt(ctx context.Context) (AdoptResult, error) {
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

// RepairResult says what a repair did.
type RepairResult struct {
	Result  RepairOutcome
	Session *Session // the chat's, nil after RepairRemoved
}

// RepairOutcome is how a repair came out.
type RepairOutcome string

// The outcomes of a repair.
const (
	RepairIntact  RepairOutcome = "intact"  // nothing was wrong with the record
	RepairAdopted RepairOutcome = "adopted" // it was written anew, from what the chat's sandbox says of itself
	RepairRemoved RepairOutcome = "removed" // the chat has no session any more
)

// Repair mends a chat's record that cannot be understood, or that names a session
// which is not alive or is another chat's. If a sandbox of the chat runs, the
// record is written anew from what it says of itself; else a record that cannot
// be used is removed. A sandbox of the chat that cannot be adopted is ended, since
// nothing could name it. It returns ErrNotFound if there is neither a record nor a
// sandbox.
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
		if err := write(ctx, lease, nil, Release); err != nil {
			return RepairResult{}, fmt.Errorf("remove the record: %w", err)
		}
		return RepairResult{Result: RepairRemoved}, nil
	case current == nil:
		return RepairResult{}, ErrNotFound
	default:
		return RepairResult{Result: RepairIntact, Session: current}, nil
	}
}

// allFinders returns all drivers: those that cannot name a chat's sandboxes at
// once list theirs.
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
