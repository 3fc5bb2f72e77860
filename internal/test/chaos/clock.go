package main

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	consulapi "github.com/hashicorp/consul/api"
)

// clock follows the time that the replicas agree on. It differs from this
// machine's time if the replicas' clocks are off.
type clock struct {
	mu     sync.Mutex
	recent []time.Duration // how far the agreed time was ahead at the last ticks
}

// clockKey is the key of the agreed time.
const clockKey = prefix + "v1/clock"

// clockSamples is how many of the last ticks count. If the agreed time stood
// still for a while, some replicas may use the later time for a few ticks.
const clockSamples = 20

// agreed returns the latest agreed time that a replica may use at this
// machine's time at.
func (c *clock) agreed(at time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.recent) == 0 {
		return at
	}
	return at.Add(slices.Max(c.recent))
}

// ours converts a recent agreed time to this machine's time.
func (c *clock) ours(agreed time.Time) time.Time { return agreed.Add(-c.agreed(agreed).Sub(agreed)) }

// follow reads the agreed time whenever it is written, until ctx is done.
func (c *clock) follow(ctx context.Context, kv *consulapi.KV) {
	var index uint64
	for ctx.Err() == nil {
		pair, meta, err := kv.Get(clockKey, (&consulapi.QueryOptions{WaitIndex: index, WaitTime: 5 * time.Second}).WithContext(ctx))
		if err != nil || pair == nil {
			pause(ctx, 200*time.Millisecond) // Consul is down, or there is no tick yet
			continue
		}
		if meta.LastIndex != index && index != 0 { // the first one may be of any age
			c.take(string(pair.Value))
		}
		index = meta.LastIndex
	}
}

func (c *clock) take(tick string) {
	_, text, _ := strings.Cut(tick, " ")
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil || time.Until(at).Abs() > 2*farOff {
		return // a fault wrote it, and no replica may use it
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent = append(c.recent, time.Until(at))
	c.recent = c.recent[max(0, len(c.recent)-clockSamples):]
}
