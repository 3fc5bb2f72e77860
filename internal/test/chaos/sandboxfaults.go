package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	nomadapi "github.com/hashicorp/nomad/api"
)

// sandboxFaults returns the faults that hit sandboxes and single chats.
func (w *world) sandboxFaults() []fault {
	return []fault{
		{"sandbox killed", 3 * time.Second, nil, func(context.Context) error {
			s := w.victim()
			if s == nil {
				return errMissed
			}
			s.signal(syscall.SIGKILL)
			return nil
		}},
		{"job stopped by an operator", 10 * time.Second, nil, func(ctx context.Context) error {
			s := w.victim()
			if s == nil {
				return errMissed
			}
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			_, _, err := w.jobs.Jobs().Deregister("bivouac-"+s.session.String(), false, (&nomadapi.WriteOptions{}).WithContext(ctx))
			if err != nil {
				w.log.note("the operator cannot stop session %s: %v", s.session, err)
				return errMissed // most likely Nomad is down
			}
			return nil
		}},
		{"task restarted in place", 12 * time.Second, nil, w.restartTask},
		{"slow stop and immediate create", 20 * time.Second, nil, w.slowStop},
		{fmt.Sprintf("%d creates at once on one chat", w.plan.burst), 15 * time.Second, nil, func(ctx context.Context) error {
			chat := w.chats[w.below(len(w.chats))]
			var all sync.WaitGroup
			for i := range w.plan.burst {
				all.Go(func() {
					_ = w.load.create(ctx, w.replicas[i%replicas], chat, w.load.input("agent-1", 10*time.Minute), tryLimit) // call records the result
				})
			}
			all.Wait()
			return nil
		}},
	}
}

// victim draws a running sandbox and records that it is about to end. It
// returns nil if none runs.
func (w *world) victim() *sandbox {
	running := w.census.running()
	var all []*sandbox
	for _, s := range running {
		if slices.Contains(w.chats, s.chat) { // not the neighbour's
			all = append(all, s)
		}
	}
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b *sandbox) int { return slices.Compare(a.session[:], b.session[:]) })
	s := all[w.below(len(all))]
	w.told.doom(s.session)
	w.log.note("FAULT hits chat %s session %s on %s, pids %v", s.chat, s.session, s.node, s.pids)
	return s
}

// restartTask makes Nomad run a sandbox's task again in the same allocation.
// The second run is not the sandbox that callers got, so it must end.
func (w *world) restartTask(ctx context.Context) error {
	s := w.victim()
	if s == nil {
		return errMissed
	}
	w.told.restarts(s)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := w.jobs.Allocations().Restart(&nomadapi.Allocation{ID: s.alloc.String()}, "", (&nomadapi.QueryOptions{}).WithContext(ctx))
	if err != nil {
		w.log.note("the operator cannot restart session %s: %v", s.session, err)
		return errMissed // most likely Nomad or the node is down, or the sandbox has just ended
	}
	return nil
}

// slowStop deletes a session whose sandbox does not end when it is asked to,
// and creates the session again at the same time.
func (w *world) slowStop(ctx context.Context) error {
	s := w.victim()
	if s == nil {
		return errMissed
	}
	s.signal(syscall.SIGSTOP) // it reacts to no signal but SIGKILL
	defer s.signal(syscall.SIGCONT)
	first := w.below(replicas)
	var both sync.WaitGroup
	both.Go(func() { _ = w.load.delete(ctx, w.replicas[first], s.chat, tryLimit) }) // call records the result
	both.Go(func() {
		pause(ctx, w.between(0, 300*time.Millisecond))
		_ = w.load.create(ctx, w.replicas[(first+1)%replicas], s.chat, w.load.input("agent-1", 10*time.Minute), tryLimit) // call records the result
	})
	both.Wait()
	return nil
}
