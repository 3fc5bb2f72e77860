// Package backoff spaces retries, and the log lines about them.
//
//	pause := backoff.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
//	for try() != nil {
//		if err := backoff.Sleep(ctx, pause.Next()); err != nil {
//			return err
//		}
//	}
//
// The callers decide what to retry, and how often.
package backoff

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Backoff computes the pauses between tries. The first is Min, and each is twice as
// long as the one before, up to Max.
type Backoff struct {
	Min, Max time.Duration
	last     time.Duration
}

// Next returns the next pause, with jitter, so that replicas that failed together do
// not all retry at the same time.
func (b *Backoff) Next() time.Duration {
	b.last = min(max(2*b.last, b.Min), b.Max)
	return Jitter(b.last)
}

// Reset makes the next pause the first one again.
func (b *Backoff) Reset() { b.last = 0 }

// Jitter returns a random duration between half of d and d. It uses crypto/rand,
// because a simulation can control that.
func Jitter(d time.Duration) time.Duration {
	var b [2]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return d/2 + d/2*time.Duration(binary.BigEndian.Uint16(b[:]))>>16
}

// Sleep waits for d. It returns ctx's error if ctx ends first.
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

// warnEvery is how often a continuing outage is logged as a warning.
const warnEvery = time.Minute

// Throttle keeps an outage from filling the log.
type Throttle struct{ warned time.Time }

// Level returns the level for one more failure: warn for the first and then once a
// minute, otherwise debug.
func (t *Throttle) Level() hclog.Level {
	if time.Since(t.warned) < warnEvery {
		return hclog.Debug
	}
	t.warned = time.Now()
	return hclog.Warn
}

// Reset makes the next failure a warning. Call it after a success.
func (t *Throttle) Reset() { t.warned = time.Time{} }
