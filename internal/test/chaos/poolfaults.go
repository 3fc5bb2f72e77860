package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
)

// poolFaults returns the faults that hit the node helpers and the spares. Those of the nodes
// hit spares, too: a node that is cut off or killed has about half of them.
func (w *world) poolFaults() []fault {
	return []fault{
		{"node helper killed", 5 * time.Second, nil, func(context.Context) error {
			return w.hitHelper(func(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) })
		}},
		{"node helper paused", 12 * time.Second, nil, func(ctx context.Context) error {
			return w.hitHelper(func(pid int) error {
				if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
					return err
				}
				pause(ctx, w.between(3*time.Second, 9*time.Second))
				return syscall.Kill(pid, syscall.SIGCONT)
			})
		}},
		{"all spares killed", 10 * time.Second, nil, func(ctx context.Context) error {
			_, err := w.hitSpares(ctx, syscall.SIGKILL)
			return err
		}},
		{"all spares stop answering", 18 * time.Second, nil, func(ctx context.Context) error {
			hit, err := w.hitSpares(ctx, syscall.SIGSTOP)
			if err != nil {
				return err
			}
			pause(ctx, w.between(4*time.Second, 9*time.Second))
			for _, s := range hit {
				w.told.unmutes(s.session)
				s.signal(syscall.SIGCONT)
			}
			return nil
		}},
	}
}

// hitHelper calls hit for one of the node helpers.
func (w *world) hitHelper(hit func(pid int) error) error {
	all, err := w.helpers()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return errMissed // Nomad starts them again
	}
	w.helpersFail()
	pid := all[w.below(len(all))]
	w.log.note("FAULT hits the node helper with pid %d", pid)
	if err := hit(pid); err != nil {
		w.log.note("the node helper with pid %d is gone: %v", pid, err)
		return errMissed
	}
	return nil
}

// hearLimit is how long after the beginning of a helper's failure, which lasts less than 10 s,
// a replica may not have heard from it what it has bound.
const hearLimit = time.Minute

// lostWarm are the warm sessions whose record a fault deleted. Only the helpers know whose
// they are. A replica that starts while a helper does not answer cannot hear of them: then
// the chat may get another sandbox, and one of the two ends.
type lostWarm struct {
	mu       sync.Mutex
	sessions map[uuid.UUID]bool // false: it must be found
	failed   time.Time          // when a helper last failed
}

// loseWarm records that the record of a warm session is about to be deleted. The function
// that it returns records that it was not.
func (w *world) loseWarm(session uuid.UUID) (undo func()) {
	w.lostWarm.mu.Lock()
	defer w.lostWarm.mu.Unlock()
	if w.lostWarm.sessions == nil {
		w.lostWarm.sessions = make(map[uuid.UUID]bool)
	}
	w.lostWarm.sessions[session] = false
	if time.Since(w.lostWarm.failed) < hearLimit {
		w.excuse(session)
	}
	return func() {
		w.lostWarm.mu.Lock()
		defer w.lostWarm.mu.Unlock()
		w.regain(session)
	}
}

// helpersFail records that a node helper is about to fail.
func (w *world) helpersFail() {
	w.lostWarm.mu.Lock()
	defer w.lostWarm.mu.Unlock()
	w.lostWarm.failed = time.Now()
	for session := range w.lostWarm.sessions {
		w.excuse(session)
	}
}

// lacksRecord reports whether a fault deleted the record of a warm session.
func (w *world) lacksRecord(session uuid.UUID) bool {
	w.lostWarm.mu.Lock()
	defer w.lostWarm.mu.Unlock()
	_, lacks := w.lostWarm.sessions[session]
	return lacks
}

// excuse records that a session need not be found. The caller holds lostWarm.mu.
func (w *world) excuse(session uuid.UUID) {
	w.lostWarm.sessions[session] = true
	w.told.doom(session)
	w.census.unrecorded.Store(session, true)
}

// regain records that a session has its record. The caller holds lostWarm.mu.
func (w *world) regain(session uuid.UUID) {
	if w.lostWarm.sessions[session] {
		w.told.acquit(session)
		w.census.unrecorded.Delete(session)
	}
	delete(w.lostWarm.sessions, session)
}

// settledWarm records that all sessions that still run have records again.
func (w *world) settledWarm() {
	w.lostWarm.mu.Lock()
	defer w.lostWarm.mu.Unlock()
	for session := range w.census.running() {
		w.regain(session)
	}
	clear(w.lostWarm.sessions)
}

// hitSpares sends a signal after which a sandbox does not answer to all spares that run, and
// returns them. A create that begins from then on must not get one of them.
func (w *world) hitSpares(ctx context.Context, sig syscall.Signal) ([]*sandbox, error) {
	hit := w.awaitSpares(ctx)
	if len(hit) == 0 {
		return nil, errMissed
	}
	for _, s := range hit {
		w.told.doom(s.session) // a create that has begun may get it
		w.log.note("FAULT hits spare session %s on %s, pids %v", s.session, s.node, s.pids)
		s.signal(sig)
	}
	for _, s := range hit {
		for limit := time.Now().Add(5 * time.Second); s.mayAnswer() && ctx.Err() == nil && time.Now().Before(limit); {
			pause(ctx, time.Millisecond)
		}
		if !s.mayAnswer() {
			w.told.mutes(s.session)
		}
	}
	return hit, nil
}

// awaitSpares returns the spares that run. If there are none, it waits for one for a while.
func (w *world) awaitSpares(ctx context.Context) (all []*sandbox) {
	for limit := time.Now().Add(5 * time.Second); len(all) == 0 && ctx.Err() == nil && time.Now().Before(limit); pause(ctx, scanEvery) {
		for _, s := range w.census.running() {
			if s.spare() {
				all = append(all, s)
			}
		}
	}
	return all
}

// mayAnswer reports whether a process of the sandbox exists and is not paused.
func (s *sandbox) mayAnswer() bool {
	return slices.ContainsFunc(s.pids, func(pid int) bool { return isAlive(pid) && stateOf(pid) != 'T' })
}

// killFilling kills the replica while it starts spares, and starts it again. It misses if
// another replica leads.
func (w *world) killFilling(ctx context.Context, r *replica) error {
	if !r.leads(ctx) {
		return errMissed
	}
	if _, err := w.hitSpares(ctx, syscall.SIGKILL); err != nil && !errors.Is(err, errMissed) {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := w.awaitStarting(limit); err != nil {
		w.log.note("no spare is being started: %v", err)
	}
	if err := r.Kill(); err != nil {
		return err
	}
	pause(ctx, w.between(0, 4*time.Second))
	return r.start(ctx)
}

// awaitStarting waits until a spare is recorded that is being started.
func (w *world) awaitStarting(ctx context.Context) error {
	for {
		pairs, _, err := w.kv.KV().List(prefix+"v1/spares/", (&consulapi.QueryOptions{}).WithContext(ctx))
		if err != nil || ctx.Err() != nil {
			return err
		}
		for _, pair := range pairs {
			if spare, err := decode(pair); err == nil && spare.State == "starting" {
				return nil
			}
		}
		pause(ctx, 5*time.Millisecond)
	}
}

// reconfigure changes what the replicas should be configured with, and restarts one of them.
// The others follow when they restart, at the latest before the next quiet period. Until
// then they disagree.
func (w *world) reconfigure(ctx context.Context, r *replica, change func(*pooling)) error {
	w.log.note("from now on replicas start with %+v", w.pools.change(change))
	return r.restart(ctx, w.log)
}
