package nomad

import (
	"context"
	"errors"
	"time"
)

const (
	// readEvery is how often Nomad is asked about a launch while there are no
	// events.
	readEvery = 250 * time.Millisecond
	// readLate is how often it is asked all the same: a stream may be up and
	// bring nothing, and that is only noticed after a while.
	readLate = 5 * time.Second
)

// lookOut reads from Nomad what events do not tell of a launch, or may not have
// told, until ctx ends. It works beside the launch, which a Nomad that is slow
// to answer must not hold up: the sandbox may be ready long since. It returns
// what went wrong last.
func (l *launch) lookOut(ctx context.Context) error {
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

// awaitNews waits for a change, at most for a time. It returns false when ctx
// ended.
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

// readAgain reads what events would have told.
func (l *launch) readAgain(ctx context.Context) error {
	if _, err := l.driver.readEvals(ctx, l.jobID); err != nil {
		return err
	}
	_, err := l.driver.read(ctx, l.jobID)
	return err
}
