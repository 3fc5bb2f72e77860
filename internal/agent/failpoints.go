//go:build failpoints

package agent

import (
	"cmp"
	"context"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/failpoint"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// withFailpoints puts a failpoint before and after each effect that the scheduler
// has: all of them pass the store, the locker, its leases, or a driver. Points of a spare
// that no chat has claimed have the name of its pool in the place of the chat's ID.
func withFailpoints(b base) base {
	b.store = failingStore{b.store}
	b.locker = failingLocker{b.locker}
	for name, driver := range b.drivers {
		failing := failingDriver{driver}
		b.drivers[name] = failing
		if w, ok := driver.(runtime.Watcher); ok {
			b.drivers[name] = struct {
				failingDriver
				runtime.Watcher
			}{failing, w}
		}
		if w, ok := driver.(watchingClaimer); ok {
			b.drivers[name] = struct {
				failingDriver
				runtime.Watcher
				failingClaimer
			}{failing, w, failingClaimer{w}}
		}
		if all, ok := driver.(watchingFinder); ok {
			b.drivers[name] = struct {
				failingDriver
				finder
				failingClaimer
			}{failing, all, failingClaimer{all}}
		}
	}
	return b
}

// watchingClaimer is what the drivers of plugins and the process driver can do beyond
// [runtime.Driver].
type watchingClaimer interface {
	runtime.Watcher
	runtime.Claimer
}

// wall returns the time that this process takes for its machine's.
func wall() time.Time { return failpoint.Wall() }

// watchingFinder is what the Nomad driver can do beyond [runtime.Driver].
type watchingFinder interface {
	finder
	runtime.Claimer
}

type finder interface {
	runtime.Watcher
	runtime.ChatFinder
	runtime.Prober
}

// around passes the points before and after an effect on a chat.
func around[T any](point string, chat uuid.UUID, effect func() (T, error)) (T, error) {
	return aroundOf(point, chat.String(), effect)
}

// aroundOf passes the points before and after an effect on a chat or a pool.
func aroundOf[T any](point, of string, effect func() (T, error)) (T, error) {
	failpoint.Hit(point+":before", of)
	value, err := effect()
	if err == nil {
		failpoint.Hit(point+":after", of)
	}
	return value, err
}

type failingStore struct{ scheduler.Store }

func (s failingStore) PutSpare(ctx context.Context, spare scheduler.Spare) (scheduler.Spare, error) {
	return aroundOf("spare-"+string(spare.State), spare.Pool, func() (scheduler.Spare, error) { return s.Store.PutSpare(ctx, spare) })
}

func (s failingStore) RemoveSpare(ctx context.Context, spare scheduler.Spare) error {
	_, err := aroundOf("spare-remove", spare.Pool, func() (struct{}, error) { return struct{}{}, s.Store.RemoveSpare(ctx, spare) })
	return err
}

type failingLocker struct{ scheduler.Locker }

func (l failingLocker) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	return around("lock", chatID, func() (scheduler.Lease, error) {
		lease, err := l.Locker.Lock(ctx, chatID, wait)
		if err != nil {
			return nil, err
		}
		return failingLease{lease, chatID}, nil
	})
}

type failingLease struct {
	scheduler.Lease
	chatID uuid.UUID
}

func (l failingLease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then, changes ...scheduler.Change) error {
	point := "remove"
	if next != nil {
		point = "write-" + string(next.State)
		if now := l.Session(); now != nil && now.State == next.State {
			point = "write-expiry"
		}
	}
	_, err := around(point, l.chatID, func() (struct{}, error) { return struct{}{}, l.Lease.Write(ctx, next, then, changes...) })
	return err
}

func (l failingLease) Claim(ctx context.Context, next *scheduler.Session, spare scheduler.Spare, changes ...scheduler.Change) error {
	_, err := around("write-claim", l.chatID, func() (struct{}, error) { return struct{}{}, l.Lease.Claim(ctx, next, spare, changes...) })
	return err
}

func (l failingLease) Release(ctx context.Context) error {
	_, err := around("release", l.chatID, func() (struct{}, error) { return struct{}{}, l.Lease.Release(ctx) })
	return err
}

type failingDriver struct{ runtime.Driver }

func (d failingDriver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	of := cmp.Or(spec.ChatID, spec.Pool)
	return aroundOf("create", of, func() (runtime.Sandbox, error) {
		return d.Driver.Create(ctx, spec, func(stage runtime.Stage) {
			failpoint.Hit("create:"+string(stage), of)
			progress(stage)
		})
	})
}

func (d failingDriver) Stop(ctx context.Context, sessionID string) error {
	return d.end(ctx, "stop", sessionID, d.Driver.Stop)
}

func (d failingDriver) Delete(ctx context.Context, sessionID string) error {
	return d.end(ctx, "delete", sessionID, d.Driver.Delete)
}

func (d failingDriver) end(ctx context.Context, point, sessionID string, end func(context.Context, string) error) error {
	of := uuid.Nil.String() // of a sandbox that the driver does not know
	if sandbox, err := d.Inspect(ctx, sessionID); err == nil {
		of = cmp.Or(sandbox.ChatID, sandbox.Pool)
	}
	_, err := aroundOf(point, of, func() (struct{}, error) { return struct{}{}, end(ctx, sessionID) })
	return err
}

type failingClaimer struct{ runtime.Claimer }

func (c failingClaimer) Claim(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	return aroundOf("claim", spec.ChatID, func() (runtime.Sandbox, error) { return c.Claimer.Claim(ctx, spec) })
}
