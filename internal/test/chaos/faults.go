package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"
)

// fault is one way to break something.
type fault struct {
	name    string
	lasts   time.Duration // usual maximum: it does not begin if less time is left
	places  chan struct{} // limits how many of the kind may run at a time; nil: no limit
	provoke func(ctx context.Context) error
}

// errMissed means that a fault found nothing to hit. Such a fault does not
// count.
var errMissed = errors.New("it hit nothing")

// lane is a list of faults that come one after the other, in parallel with the
// other lanes. The pauses are chosen so that a full run has each fault 20 times
// in some 40 minutes, and so that most of the time not everything
// is broken.
type lane struct {
	faults   []fault
	from, to time.Duration // pause before each fault
}

// stir runs callers and faults for a time. It returns when all faults have
// ended and all callers are gone.
func (w *world) stir(ctx context.Context, d time.Duration) error {
	until := time.Now().Add(d)
	asking, enough := context.WithCancel(ctx)
	defer enough()
	var callers errgroup.Group
	random := rand.New(rand.NewPCG(w.draw(), w.draw()))
	callers.Go(func() error { w.load.run(asking, w.plan.workers, random); return nil })
	lanes, lanesCtx := errgroup.WithContext(ctx)
	for _, l := range w.lanes() {
		lanes.Go(func() error { return w.provokeAll(lanesCtx, l, until) })
	}
	err := lanes.Wait()
	if err == nil { // the last fault hits while everything is in the middle of something
		err = w.provoke(ctx, w.replicaFaults(w.replicas[w.below(replicas)])[0])
	}
	enough()
	_ = callers.Wait() // it returns no error
	return err
}

func (w *world) lanes() []lane {
	lanes := []lane{
		{w.consulFaults(), 5 * time.Second, 12 * time.Second},
		{w.nomadServerFaults(), 7 * time.Second, 15 * time.Second},
		{w.nomadClientFaults(), 3 * time.Second, 9 * time.Second},
		{w.sandboxFaults(), 5 * time.Second, 14 * time.Second},
		{w.storeFaults(), 10 * time.Second, 30 * time.Second},
	}
	if w.pools != nil {
		lanes = append(lanes, lane{w.poolFaults(), 5 * time.Second, 12 * time.Second})
	}
	for _, r := range w.replicas {
		lanes = append(lanes, lane{w.replicaFaults(r), 2 * time.Second, 7 * time.Second})
	}
	return lanes
}

// provokeAll provokes the faults of one lane until the given time.
func (w *world) provokeAll(ctx context.Context, l lane, until time.Time) error {
	for {
		pause(ctx, w.between(l.from, l.to))
		f, ok := w.choose(l.faults, time.Until(until))
		if !ok {
			return nil
		}
		if err := w.provoke(ctx, f); err != nil {
			return err
		}
	}
}

func (w *world) provoke(ctx context.Context, f fault) error {
	if f.places != nil {
		select {
		case f.places <- struct{}{}:
			defer func() { <-f.places }()
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	w.log.note("FAULT %s begins, %d requests under way", f.name, w.load.inFlight.Load())
	end := w.log.faults.begin(f.name, int(w.load.inFlight.Load()))
	err := f.provoke(ctx)
	missed := errors.Is(err, errMissed)
	end(!missed)
	w.log.note("FAULT %s is over", f.name)
	if err != nil && !missed && ctx.Err() == nil {
		return fmt.Errorf("%s: %w", f.name, err)
	}
	return nil
}

// choose draws one of the least frequent faults that fit into the time left.
func (w *world) choose(faults []fault, left time.Duration) (fault, bool) {
	var fit []fault
	least := 0
	for _, f := range faults {
		if f.lasts > left {
			continue
		}
		if times := w.log.faults.times(f.name); len(fit) == 0 || times < least {
			least = times
		}
		fit = append(fit, f)
	}
	var rare []fault
	for _, f := range fit {
		if w.log.faults.times(f.name) <= least+1 {
			rare = append(rare, f)
		}
	}
	if len(rare) == 0 {
		return fault{}, false
	}
	return rare[w.below(len(rare))], true
}

// rarest returns the least frequent fault and how often it came.
func (w *world) rarest() (name string, times int) {
	for _, l := range w.lanes() {
		for _, f := range l.faults {
			if n := w.log.faults.times(f.name); name == "" || n < times {
				name, times = f.name, n
			}
		}
	}
	return name, times
}

// patience is how long something may be down before the suite gives up.
const patience = 3 * time.Minute

// patiently retries until the call succeeds, because its target may be down at
// the moment.
func patiently(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		one, cancelOne := context.WithTimeout(ctx, 10*time.Second)
		err := try(one)
		cancelOne()
		if err == nil || ctx.Err() != nil {
			return err
		}
		pause(ctx, 100*time.Millisecond)
	}
}
