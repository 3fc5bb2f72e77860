package main

import (
	"context"
	"errors"
	"syscall"
	"time"
)

// pastTTL is longer than twice the TTL of a replica's Consul session: after that
// its locks are another's.
const pastTTL = 25 * time.Second

// replicaFaults are what one replica suffers. One of the three is always spared.
func (w *world) replicaFaults(r *replica) []fault {
	suffers := func(name string, lasts time.Duration, f func(context.Context) error) fault {
		return fault{name, lasts, w.out, func(ctx context.Context) error { return errors.Join(f(ctx), r.ready(ctx)) }}
	}
	troubled := func(name string, p *proxy, t trouble, from, to time.Duration) fault {
		return suffers(name, to+5*time.Second, func(ctx context.Context) error {
			r.awaitBusy(ctx)
			p.trouble(t)
			defer p.trouble(trouble{})
			pause(ctx, w.between(from, to))
			return nil
		})
	}
	lossy := trouble{loseReply: 0.25, loseRequest: 0.1, late: 0.15}
	return []fault{
		suffers("replica killed", 15*time.Second, func(ctx context.Context) error {
			r.awaitBusy(ctx)
			pause(ctx, w.between(0, 200*time.Millisecond))
			if err := r.kill(); err != nil {
				return err
			}
			pause(ctx, w.between(0, 4*time.Second))
			return r.start(ctx)
		}),
		suffers("replica paused past 2 x TTL", 35*time.Second, func(ctx context.Context) error {
			r.awaitBusy(ctx)
			pause(ctx, w.between(0, 200*time.Millisecond))
			if err := r.signal(syscall.SIGSTOP); err != nil {
				return err
			}
			pause(ctx, pastTTL)
			return r.signal(syscall.SIGCONT)
		}),
		suffers("replica told to stop", 20*time.Second, func(ctx context.Context) error {
			r.awaitBusy(ctx)
			if err := r.stop(); err != nil {
				w.log.violation(wrong, r.name, "%v", err)
			}
			return r.start(ctx)
		}),
		troubled("replica cut off from Consul", r.consul, trouble{cut: true}, 12*time.Second, 24*time.Second),
		troubled("replica cut off from Nomad", r.nomad, trouble{cut: true}, 5*time.Second, 14*time.Second),
		troubled("replies of Consul lost or late", r.consul, lossy, 5*time.Second, 9*time.Second),
		troubled("replies of Nomad lost or late", r.nomad, lossy, 5*time.Second, 9*time.Second),
		troubled("429 from Consul", r.consul, trouble{refuse: 0.7}, 4*time.Second, 7*time.Second),
		troubled("429 from Nomad", r.nomad, trouble{refuse: 0.7}, 4*time.Second, 7*time.Second),
	}
}

// awaitBusy waits until the replica is in the middle of something, or for a while.
func (r *replica) awaitBusy(ctx context.Context) {
	limit := time.Now().Add(3 * time.Second)
	for r.busy.Load() == 0 && ctx.Err() == nil && time.Now().Before(limit) {
		pause(ctx, 2*time.Millisecond)
	}
}
