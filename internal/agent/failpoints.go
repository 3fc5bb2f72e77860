//go:build failpoints

package agent

import (
	"context"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/failpoint"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// withFailpoints puts a failpoint before and after each effect that the scheduler
// has: all of them pass the locker, its leases, or a driver.
func withFailpoints(b base) base {
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
		if all, ok := driver.(watchingFinder); ok {
			b.drivers[name] = struct {
				failingDriver
				watchingFinder
			}{failing, all}
		}
	}
	return b
}

// wall returns the time that this process takes for its machine's.
func wall() time.Time { return failpoint.Wall() }

// watchingFinder is what the Nomad driver can do beyond [runtime.Driver].
type watchingFinder interface {
	runtime.Watcher
	runtime.ChatFinder
	runtime.Prober
}

// around passes the points before and after an effect.
func around[T any](point string, chat uuid.UUID, effect func() (T, error)) (T, error) {
	failpoint.Hit(point+":before", chat.String())
	value, err := effect()
	if err == nil {
		failpoint.Hit(point+":after", chat.String())
	}
	return value, err
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

func (l failingLease) Write(ctx context.Context, next *scheduler.Session, then scheduler.Then) error {
	point := "remove"
	if next != nil {
		point = "write-" + string(next.State)
		if now := l.Session(); now != nil && now.State == next.State {
			point = "write-expiry"
		}
	}
	_, err := around(point, l.chatID, func() (struct{}, error) { return struct{}{}, l.Lease.Write(ctx, next, then) })
	return err
}

func (l failingLease) Release(ctx context.Context) error {
	_, err := around("release", l.chatID, func() (struct{}, error) { return struct{}{}, l.Lease.Release(ctx) })
	return err
}

type failingDriver struct{ runtime.Driver }

func (d failingDriver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	return around("create", uuid.MustParse(spec.ChatID), func() (runtime.Sandbox, error) {
		return d.Driver.Create(ctx, spec, func(stage runtime.Stage) {
			failpoint.Hit("create:"+string(stage), spec.ChatID)
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
	chat := uuid.Nil // of a sandbox that the driver does not know
	if sandbox, err := d.Inspect(ctx, sessionID); err == nil {
		chat = uuid.MustParse(sandbox.ChatID)
	}
	_, err := around(point, chat, func() (struct{}, error) { return struct{}{}, end(ctx, sessionID) })
	return err
}
