package scheduler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// fillInterval is how often the leader looks after its pools, if nothing tells it to
	// do so earlier.
	fillInterval = 5 * time.Second

	// The leader starts this many spares at a time and per second, so that filling a pool
	// leaves the runtime room for creates. It ends as many at a time.
	fillAtATime = 4
	fillRate    = 10

	// refillDelay is how long after its first spare was taken a full pool is refilled, so that
	// no start slows the creates that come at once.
	refillDelay = 500 * time.Millisecond

	// The shortest and the longest pause after failed starts of spares.
	minFillPause = time.Second
	maxFillPause = time.Minute

	// endPause is the pause after a failed end of a spare.
	endPause = fillInterval

	// fillPatience is how many starts of spares have to fail in a row until Health
	// reports it.
	fillPatience = 3
)

// filling is what this replica knows about the filling of its pools while it leads.
type filling struct {
	mu       sync.Mutex
	failures map[string]fillFailure // by pool, those that failed last; nil: this replica does not fill pools

	woken chan struct{} // has a token if the leader has to look after its pools soon
}

type fillFailure struct {
	err   error
	times int // in a row
}

// wake has the leader look after its pools soon.
func (f *filling) wake() {
	select {
	case f.woken <- struct{}{}:
	default: // it will look anyway
	}
}

// reset sets the failures that are known.
func (f *filling) reset(failures map[string]fillFailure) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures = failures
}

// note records the result of a start.
func (f *filling) note(pool string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.failures, pool)
	} else if f.failures != nil {
		f.failures[pool] = fillFailure{err, f.failures[pool].times + 1}
	}
}

// problems returns a line for each pool that cannot be filled.
func (f *filling) problems() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(f.failures)) {
		if failure := f.failures[name]; failure.times >= fillPatience {
			lines = append(lines, fmt.Sprintf("pool %q cannot be filled, and creates start cold: %v", name, failure.err))
		}
	}
	return lines
}

// fillPools keeps all pools full until ctx ends. leading is the leader's lock.
func (s *Scheduler) fillPools(ctx context.Context, leading Lease) error {
	s.filling.reset(map[string]fillFailure{})
	defer s.filling.reset(nil)
	f := &filler{
		s:     s,
		rate:  rate.NewLimiter(fillRate, 1),
		mine:  map[uuid.UUID]string{},
		later: map[uuid.UUID]time.Time{},
		pools: map[string]*poolFiller{},
	}
	for _, pool := range s.Config.Pools {
		f.pools[pool.Name] = &poolFiller{Pool: pool, pause: backoff.Backoff{Min: minFillPause, Max: maxFillPause}}
	}
	defer f.work.Wait()
	interval := fillInterval
	if len(f.pools) == 0 {
		interval = reconcileInterval // to end what is left of removed pools
	}
	var outage backoff.Throttle
	for ctx.Err() == nil {
		again := interval
		err := write(ctx, leading, nil, Keep) // safeguard: one leader fills pools
		if err == nil {
			again, err = f.pass(ctx, interval)
		}
		s.logFailure(ctx, &outage, "fill_failed", err)
		waiting, cancel := context.WithTimeout(ctx, again)
		select {
		case <-waiting.Done():
		case <-s.filling.woken:
		}
		cancel()
	}
	return nil
}

// filler keeps pools full. Only the leader has one. If there are two leaders for a
// moment, there may be too many spares for a moment: each has its own record, and what is
// too much is ended.
type filler struct {
	s     *Scheduler
	rate  *rate.Limiter
	work  sync.WaitGroup // starts and ends spares
	pools map[string]*poolFiller

	mu    sync.Mutex
	mine  map[uuid.UUID]string    // spares that it is starting, with their pools, and those that it is ending, with ""
	later map[uuid.UUID]time.Time // spares that it could not end, with when to try again
}

// poolFiller is a pool and when the next spare of it may be started.
type poolFiller struct {
	Pool
	variant string // as last read
	full    bool   // when last looked at
	silent  bool   // its runtime does not answer, and is asked no more in this pass

	pause     backoff.Backoff // guarded by the filler's mu, like notBefore
	notBefore time.Time
}

// pass compares the spares with the pools, and begins to start what is missing and to
// end what is too much. It returns when to look again: after interval, or earlier.
func (f *filler) pass(ctx context.Context, interval time.Duration) (again time.Duration, err error) {
	again = interval
	// What it works on is read before the records. So a spare that becomes ready in between
	// counts once, and one that is being ended never counts.
	mine := f.working()
	known, _, err := f.s.Store.Spares(ctx, Block{})
	if err != nil {
		return again, fmt.Errorf("read spares: %w", err)
	}
	var failed []error
	for _, pool := range f.pools {
		err := f.readVariant(ctx, pool)
		pool.silent = err != nil
		failed = append(failed, err)
	}
	have := map[string]int{}
	for _, pool := range mine {
		have[pool]++
	}
	var ends []unwanted
	for _, spare := range known {
		if _, isMine := mine[spare.SessionID]; isMine {
			continue
		}
		if reason := f.whyEnd(ctx, spare, have[spare.Pool]); reason != "" {
			ends = append(ends, unwanted{spare, reason})
			continue
		}
		have[spare.Pool]++
	}
	f.endAll(ctx, ends, known)
	for name, pool := range f.pools {
		isFull := have[name] >= pool.Size
		if pool.full && !isFull {
			f.delayRefill(pool)
		}
		pool.full = isFull
		for ; have[name] < pool.Size && pool.variant != ""; have[name]++ {
			if wait := f.untilStart(pool); wait > 0 {
				again = min(again, wait)
				break
			}
			spare := f.newSpare(pool)
			f.begin(spare.SessionID, name, func() { f.start(ctx, pool, spare) })
		}
	}
	f.s.metrics.passSucceeded(ctx, "fill")
	return again, errors.Join(failed...)
}

func (f *filler) readVariant(ctx context.Context, pool *poolFiller) error {
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	info, err := f.s.Drivers[pool.Runtime].Info(limited)
	if err != nil {
		return fmt.Errorf("pool %s: runtime %s: %w", pool.Name, pool.Runtime, err)
	}
	pool.variant = info.Variant
	return nil
}

// whyEnd returns why a spare is to be ended, or "" if a create may claim it. have is how
// many others its pool has. If its runtime cannot tell how it is, it stays: a claim looks
// again.
func (f *filler) whyEnd(ctx context.Context, spare Spare, have int) string {
	pool := f.pools[spare.Pool]
	switch {
	case pool == nil:
		return "its pool is no longer configured"
	case spare.State == SpareStarting:
		return "the server that was starting it has gone"
	case spare.State == SpareEnding:
		return "its end had not finished"
	case spare.Runtime != pool.Runtime, pool.variant != "" && spare.Variant != pool.variant:
		return "sandboxes of its pool are now started in another way"
	case have >= pool.Size:
		return "its pool has enough"
	case pool.silent:
		return ""
	}
	limited, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	sandbox, err := f.s.Drivers[pool.Runtime].Inspect(limited, spare.SessionID.String())
	switch {
	case errors.Is(err, runtime.ErrNotFound), errors.Is(err, runtime.ErrConflict):
		return hidingToken(err, spare.AccessToken).Error()
	case err != nil:
		pool.silent = limited.Err() != nil
		return ""
	case sandbox.State != runtime.StateRunning:
		return strings.TrimSuffix(fmt.Sprintf("it is %s: %s", sandbox.State, sandbox.Reason), ": ")
	case sandbox.ContainerID != spare.ContainerID:
		return "another sandbox has its ID"
	}
	return sandbox.Reason
}

// working returns a copy of f.mine.
func (f *filler) working() map[uuid.UUID]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.mine)
}

// unwanted is a spare that is to be ended.
type unwanted struct {
	Spare
	reason string
}

// endAll begins to end spares, those first whose last try is longest ago. known are all.
func (f *filler) endAll(ctx context.Context, spares []unwanted, known []Spare) {
	later := f.endTimes(known)
	slices.SortStableFunc(spares, func(a, b unwanted) int { return later[a.SessionID].Compare(later[b.SessionID]) })
	for _, spare := range spares {
		if time.Now().Before(later[spare.SessionID]) || f.isBusy(false) {
			return // the end of one wakes the filler
		}
		f.begin(spare.SessionID, "", func() { f.end(ctx, spare) })
	}
}

// endTimes returns when the spares may be ended that could not be. It forgets those that
// are not known any more.
func (f *filler) endTimes(known []Spare) map[uuid.UUID]time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.later, func(id uuid.UUID, _ time.Time) bool {
		return !slices.ContainsFunc(known, func(s Spare) bool { return s.SessionID == id })
	})
	return maps.Clone(f.later)
}

// begin has a spare worked on, and then has the filler look again. pool is "" if the spare
// is being ended.
func (f *filler) begin(sessionID uuid.UUID, pool string, do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mine[sessionID] = pool
	f.work.Go(func() {
		do()
		f.mu.Lock()
		delete(f.mine, sessionID)
		f.mu.Unlock()
		f.s.filling.wake()
	})
}

// isBusy reports whether as many spares are started, or ended, as may be at a time. Starts
// do not wait for ends, which may take long: a node may be gone.
func (f *filler) isBusy(starting bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, pool := range f.mine {
		if (pool != "") == starting {
			n++
		}
	}
	return n >= fillAtATime
}

// untilStart returns how long to wait until a spare may be started. If that is 0, the
// caller may start one.
func (f *filler) untilStart(pool *poolFiller) time.Duration {
	f.mu.Lock()
	wait := time.Until(pool.notBefore)
	f.mu.Unlock()
	if wait > 0 {
		return wait
	}
	if f.isBusy(true) {
		return fillInterval // the end of one wakes the filler earlier
	}
	start := f.rate.Reserve()
	if wait = start.Delay(); wait > 0 {
		start.Cancel()
	}
	return wait
}

func (f *filler) newSpare(pool *poolFiller) Spare {
	return Spare{
		SessionID:   uuid.New(),
		Pool:        pool.Name,
		Runtime:     pool.Runtime,
		Variant:     pool.variant,
		State:       SpareStarting,
		AccessToken: newAccessToken(),
		CreatedAt:   f.s.now(),
	}
}

// start starts a spare.
func (f *filler) start(ctx context.Context, pool *poolFiller, spare Spare) {
	began := time.Now()
	err := f.s.startSpare(ctx, spare)
	if ctx.Err() != nil {
		return // another leader ends it
	}
	f.s.filling.note(pool.Name, err)
	f.s.metrics.pools.filled(ctx, pool.Pool, time.Since(began), err)
	f.pace(pool, err)
	if err == nil {
		f.s.Logger.Debug("spare_ready", "pool", pool.Name, "session_id", spare.SessionID)
		f.s.noteSpare(ctx, ChangeSpareReady, spare, "")
		return
	}
	f.s.Logger.Warn("spare_failed", "pool", pool.Name, "session_id", spare.SessionID, "error", Kind(err), "detail", err)
	f.s.noteSpare(ctx, ChangeSpareFailed, spare, err.Error())
}

// pace has the pool's next start wait after one that failed.
func (f *filler) pace(pool *poolFiller, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		pool.pause.Reset()
	} else {
		pool.notBefore = time.Now().Add(pool.pause.Next())
	}
}

// delayRefill has the next start of a pool that was full wait, unless it waits longer because
// one has failed.
func (f *filler) delayRefill(pool *poolFiller) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if at := time.Now().Add(refillDelay); at.After(pool.notBefore) {
		pool.notBefore = at
	}
}

// end ends a spare that is no longer wanted.
func (f *filler) end(ctx context.Context, spare unwanted) {
	err := f.s.endSpare(ctx, spare.Spare)
	if err != nil {
		f.mu.Lock()
		f.later[spare.SessionID] = time.Now().Add(endPause)
		f.mu.Unlock()
	}
	switch {
	case errors.Is(err, ErrSpareTaken), ctx.Err() != nil:
	case err != nil:
		f.s.Logger.Warn("spare_end_failed", "pool", spare.Pool, "session_id", spare.SessionID, "error", Kind(err), "detail", err)
	default:
		f.s.Logger.Debug("spare_ended", "pool", spare.Pool, "session_id", spare.SessionID, "reason", spare.reason)
		f.s.noteSpare(ctx, ChangeSpareEnded, spare.Spare, spare.reason)
	}
}
