package nomad

import (
	"context"
	"errors"
	"time"
)

const (
	// readEvery is how often a launch is read from Nomad while there are no events.
	readEvery = 250 * time.Millisecond
	// readLate is how often it is read while there are events. An open stream may
	// bring none, and that is noticed only after a while.
	readLate = 5 * time.Second
)

// poll reads a launch from Nomad until ctx ends, in case its events are missing.
// It runs beside the launch, so that a slow Nomad does not delay a sandbox that is
// already ready. It returns its last error.
func (l *launch) poll(ctx context.Context) error {
	cache := l.driver.cache
	w, done := cache.await(l.jobID)
	defer done()
	last := errors.New("no allocation yet")
	var looked time.Time // zero: not yet
	for began := time.Now(); ; {
		current, breaks := cache.stream()
		missed := !current || breaks != l.breaks
		due := looked.Add(readEvery)
		if !missed {
			due = later(looked, began).Add(readLate)
		}
		if wait := time.Until(due); wait > 0 {
			if !awaitNews(ctx, w.C, wait) {
				return last
			}
			continue
		}
		err := l.readAgain(ctx)
		switch {
		case ctx.Err() != nil:
			return last
		case err != nil:
			last = err
		case current:
			l.breaks = breaks
		}
		looked = time.Now()
	}
}

// awaitNews waits for a change, but at most for wait. It returns false if ctx ended.
func awaitNews(ctx context.Context, changed <-chan struct{}, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case <-changed:
	}
	return true
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// readAgain reads the job, its allocations and its evaluations.
func (l *launch) readAgain(ctx context.Context) error {
	if _, err := l.driver.readEvals(ctx, l.jobID); err != nil {
		return err
	}
	_, err := l.driver.read(ctx, l.jobID)
	return err
}
