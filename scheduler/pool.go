package scheduler

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
)

// Pool is a number of spares that the leader keeps ready. A create takes one of them
// instead of starting a sandbox.
type Pool struct {
	Name    string // see [runtime.ValidName]
	Runtime string // a key of Config.Drivers whose driver is a [runtime.Claimer]; each has at most one pool
	Size    int    // 1 to MaxPoolSize
}

// MaxPoolSize is the maximum size of a pool.
const MaxPoolSize = 1000

// PoolStatus is a pool and how many spares it has.
type PoolStatus struct {
	Pool
	Ready, Starting, Ending int
}

// Pools returns the pools that are configured in this replica, and those that have
// spares, by name. It returns ErrPermissionDenied to a caller who may not see all
// sessions.
func (s *Scheduler) Pools(ctx context.Context) ([]PoolStatus, error) {
	if caller := CallerFrom(ctx); !caller.readsAll() {
		return nil, fmt.Errorf("pools: %w: %q may not see all sessions", ErrPermissionDenied, caller.Name)
	}
	spares, _, err := s.Store.Spares(ctx, Block{})
	if err != nil {
		return nil, fmt.Errorf("pools: %w", err)
	}
	byName := map[string]*PoolStatus{}
	for _, pool := range s.Config.Pools {
		byName[pool.Name] = &PoolStatus{Pool: pool}
	}
	for _, spare := range spares {
		if byName[spare.Pool] == nil {
			byName[spare.Pool] = &PoolStatus{Pool: Pool{Name: spare.Pool, Runtime: spare.Runtime}}
		}
		byName[spare.Pool].count(spare.State)
	}
	var all []PoolStatus
	for _, status := range byName {
		all = append(all, *status)
	}
	slices.SortFunc(all, func(a, b PoolStatus) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

func (p *PoolStatus) count(state SpareState) {
	switch state {
	case SpareReady:
		p.Ready++
	case SpareStarting:
		p.Starting++
	case SpareEnding:
		p.Ending++
	}
}

// checkPools returns what is wrong with the pools of a configuration.
func (c Config) checkPools() error {
	names, runtimes := map[string]bool{}, map[string]bool{}
	for _, pool := range c.Pools {
		_, claims := c.Drivers[pool.Runtime].(runtime.Claimer)
		switch {
		case !runtime.ValidName(pool.Name):
			return fmt.Errorf("%w: %q is not a valid name of a pool", ErrInvalid, pool.Name)
		case pool.Size < 1 || pool.Size > MaxPoolSize:
			return fmt.Errorf("%w: pool %q: size is %d, but must be from 1 to %d", ErrInvalid, pool.Name, pool.Size, MaxPoolSize)
		case c.Drivers[pool.Runtime] == nil:
			return fmt.Errorf("%w: pool %q: unknown runtime %q", ErrInvalid, pool.Name, pool.Runtime)
		case !claims:
			return fmt.Errorf("%w: pool %q: runtime %q cannot start sandboxes ahead", ErrInvalid, pool.Name, pool.Runtime)
		case names[pool.Name]:
			return fmt.Errorf("%w: there are two pools with the name %q", ErrInvalid, pool.Name)
		case runtimes[pool.Runtime]:
			return fmt.Errorf("%w: pool %q: runtime %q has another pool", ErrInvalid, pool.Name, pool.Runtime)
		}
		names[pool.Name], runtimes[pool.Runtime] = true, true
	}
	return nil
}

// poolOf returns the pool of a runtime.
func (c Config) poolOf(runtimeName string) (Pool, bool) {
	i := slices.IndexFunc(c.Pools, func(p Pool) bool { return p.Runtime == runtimeName })
	if i < 0 {
		return Pool{}, false
	}
	return c.Pools[i], true
}

// spares is what this replica last read of all spares. It may be stale, so a spare
// that is taken from it may be taken already.
type spares struct {
	mu    sync.Mutex
	known []Spare // by session ID
	// taken are those that this replica has claimed, until they disappear from known.
	taken map[uuid.UUID]bool
}

// followWait is how long one read of all spares waits for a change. The wait does not end
// early if Consul's index goes back.
const followWait = 10 * time.Second

// followPause is how long a replica waits between two reads of all spares, so that many
// claims in a row do not make it read them as many times.
const followPause = 50 * time.Millisecond

// followSpares keeps s.spares up to date until ctx ends or the store fails. If this replica
// leads, it refills the pools at each change.
func (s *Scheduler) followSpares(ctx context.Context) error {
	var index uint64
	for {
		known, next, err := s.Store.Spares(ctx, Block{Index: index, Wait: followWait})
		if err != nil {
			return fmt.Errorf("read spares: %w", err)
		}
		index = next
		s.spares.set(known)
		s.filling.wake() // one may have been claimed
		if err := backoff.Sleep(ctx, followPause); err != nil {
			return err
		}
	}
}

func (p *spares) set(known []Spare) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known = known
	taken := map[uuid.UUID]bool{}
	for _, spare := range known {
		if p.taken[spare.SessionID] {
			taken[spare.SessionID] = true
		}
	}
	p.taken = taken
}

// free returns the spares of a pool that seem to be ready. The caller holds mu.
func (p *spares) free(pool Pool) []Spare {
	var free []Spare
	for _, spare := range p.known {
		if spare.State == SpareReady && spare.Pool == pool.Name && !p.taken[spare.SessionID] {
			free = append(free, spare)
		}
	}
	return free
}

// take returns a spare that seems to be ready, and returns it to no other caller until
// giveBack is called.
func (p *spares) take(pool Pool, variant string) (Spare, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fit := slices.DeleteFunc(p.free(pool), func(spare Spare) bool {
		return spare.Runtime != pool.Runtime || spare.Variant != variant
	})
	if len(fit) == 0 {
		return Spare{}, false
	}
	random := uuid.New() // so that replicas seldom take the same one
	spare := fit[int(binary.BigEndian.Uint16(random[:]))%len(fit)]
	p.taken[spare.SessionID] = true
	return spare, true
}

func (p *spares) giveBack(spare Spare) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.taken, spare.SessionID)
}

// ready returns how many spares of a pool were ready when they were last read.
func (p *spares) ready(pool Pool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.free(pool))
}

const (
	// maxClaims is how many spares a create tries to take, if others are faster.
	maxClaims = 4

	// claimLimit bounds how long a driver may take to give a spare to a chat. After
	// that the create starts a sandbox.
	claimLimit = 5 * time.Second
)

// writeIntent writes the intent of a create. If there is a spare for it, the intent
// becomes that of the spare's session.
func (s *Scheduler) writeIntent(ctx context.Context, lease Lease, driver runtime.Driver, intent *Session, changes []Change) error {
	if pool, ok := s.poolOf(intent.Runtime); ok {
		claimed, err := s.claimSpare(ctx, lease, driver, pool, intent, changes)
		if claimed || err != nil {
			return err
		}
		s.metrics.pools.claimed(ctx, pool, "miss")
	}
	return write(ctx, lease, intent, Keep, append(changes, s.change(ctx, ChangeCreated, *intent, ""))...) // safeguard: intent
}

// claimSpare writes the intent with the session of a spare, and removes the spare's record
// in the same step. So a spare never belongs to two chats. It returns false, and leaves the
// intent as it is, if there is no spare.
func (s *Scheduler) claimSpare(ctx context.Context, lease Lease, driver runtime.Driver, pool Pool, intent *Session, changes []Change) (bool, error) {
	for range maxClaims {
		spare, ok := s.takeSpare(ctx, pool, driver)
		if !ok {
			return false, nil
		}
		warm := *intent
		warm.SessionID, warm.AccessToken, warm.Warm = spare.SessionID, spare.AccessToken, true
		created := s.change(ctx, ChangeCreated, warm, "a spare of pool "+pool.Name)
		err := lockLost(ctx, lease.Claim(ctx, &warm, spare, append(slices.Clone(changes), created)...))
		if errors.Is(err, ErrSpareTaken) {
			s.metrics.pools.claimed(ctx, pool, "taken")
			continue
		}
		if err != nil {
			s.spares.giveBack(spare)
		}
		*intent = warm
		return true, err
	}
	return false, nil
}

// takeSpare returns a spare that the driver can give to a chat.
func (s *Scheduler) takeSpare(ctx context.Context, pool Pool, driver runtime.Driver) (Spare, bool) {
	if s.spares.ready(pool) == 0 {
		return Spare{}, false
	}
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	info, err := driver.Info(limited)
	if err != nil {
		return Spare{}, false // the start that follows says why
	}
	return s.spares.take(pool, info.Variant)
}

// claim has the driver give the spare of a warm intent to its chat.
func (s *Scheduler) claim(ctx context.Context, driver runtime.Driver, intent Session) (sandbox runtime.Sandbox, err error) {
	pool, _ := s.poolOf(intent.Runtime)
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	if claimer, ok := driver.(runtime.Claimer); ok {
		sandbox, err = claimer.Claim(limited, intent.spec())
	} else {
		err = errors.ErrUnsupported
	}
	if err == nil {
		err = checkStarted(sandbox, intent)
	}
	if err != nil {
		err = hidingToken(err, intent.AccessToken)
		s.metrics.pools.claimed(ctx, pool, "failed")
		s.Logger.Warn("claim_failed", "pool", pool.Name, "chat_id", intent.ChatID, "session_id", intent.SessionID, "error", Kind(err), "detail", err)
		return runtime.Sandbox{}, err
	}
	s.metrics.pools.claimed(ctx, pool, "hit")
	s.metrics.pools.claim.Record(ctx, time.Since(began).Seconds(), ofPool(pool))
	return sandbox, nil
}

// goCold ends the spare of a warm intent that could not be claimed because of cause, and
// turns the intent into one without a spare. It leaves the spare of another chat alone.
func (s *Scheduler) goCold(ctx context.Context, lease Lease, driver runtime.Driver, intent *Session, cause error) error {
	reason := cause.Error()
	_, err := isKnown(ctx, driver, *intent)
	othersSpare := isOthersSpare(*intent, err)
	if err == nil {
		err = stop(ctx, lease, driver, runtime.Driver.Delete, intent.SessionID.String())
	}
	switch {
	case othersSpare:
		reason = "it belongs to another chat" // whose callers alone may know more
	case err != nil:
		return fmt.Errorf("end a spare that could not be claimed: %w", err)
	}
	failed := s.change(ctx, ChangeStartFailed, *intent, "the spare could not be claimed: "+reason)
	intent.SessionID, intent.AccessToken, intent.Warm = uuid.New(), newAccessToken(), false
	return write(ctx, lease, intent, Keep, failed, s.change(ctx, ChangeCreated, *intent, ""))
}
