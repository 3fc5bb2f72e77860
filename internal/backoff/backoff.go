// Package backoff spaces what is tried again, and what is logged meanwhile.
//
//	pause := backoff.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
//	for try() != nil {
//		if err := backoff.Sleep(ctx, pause.Next()); err != nil {
//			return err
//		}
//	}
//
// What may be tried again, and how often, its callers decide.
package backoff

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Backoff is the pauses between tries: from Min on, each twice as long as the one
// before, up to Max.
type Backoff struct {
	Min, Max time.Duration
	last     time.Duration
}

// Next returns the next pause, with jitter: replicas that were refused together
// do not come back together.
func (b *Backoff) Next() time.Duration {
	b.last = min(max(2*b.last, b.Min), b.Max)
	return Jitter(b.last)
}

// Reset makes the next pause the first one again.
func (b *Backoff) Reset() { b.last = 0 }

// Jitter returns a random time between half of d and d. It draws from
// crypto/rand, since that is what a simulation can decide.
func Jitter(d time.Duration) time.Duration {
	var b [2]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return d/2 + d/2*time.Duration(binary.BigEndian.Uint16(b[:]))>>16
}

// Sleep waits for d. It returns ctx's error if ctx ends before.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// warnEvery is how often an outage is told of that goes on.
const warnEvery = time.Minute

// Throttle keeps an outage from filling the log.
type Throttle struct{ warned time.Time }

// Level returns the level for one more failure: a warning at first and then once
// a minute, else for debugging.
func (t *Throttle) Level() hclog.Level {
	if time.Since(t.warned) < warnEvery {
		return hclog.Debug
	}
	t.warned = time.Now()
	return hclog.Warn
}

// Reset makes the next failure a warning: all was well again.
func (t *Throttle) Reset() { t.warned = time.Time{} }
