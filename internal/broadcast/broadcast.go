// Package broadcast lets goroutines wait until something has changed.
//
//	var mu sync.Mutex
//	changed := broadcast.Cond{L: &mu}
//
//	mu.Lock() // in the goroutine that changes it
//	ready = true
//	changed.Broadcast()
//	mu.Unlock()
//
//	err := changed.Wait(ctx, func() bool { return ready }) // in those that wait
//
// It carries no values: a waiter looks at the current state.
package broadcast

import (
	"context"
	"sync"
)

// Cond is like [sync.Cond], but a wait ends with its context.
type Cond struct {
	L sync.Locker // guards what is waited for; must be set before use

	changed chan struct{} // closed by the next Broadcast; nil: nobody waits
}

// Broadcast wakes all waiters. The caller must hold L.
func (c *Cond) Broadcast() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// Wait waits until done returns true. It calls done with L held, at once and after each
// Broadcast. It returns ctx's error if ctx ends first.
func (c *Cond) Wait(ctx context.Context, done func() bool) error {
	for {
		changed := c.look(done)
		if changed == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// look returns nil if done returns true, and otherwise a channel that the next Broadcast
// closes.
func (c *Cond) look(done func() bool) <-chan struct{} {
	c.L.Lock()
	defer c.L.Unlock()
	if done() {
		return nil
	}
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.changed
}
