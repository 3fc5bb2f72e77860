package scheduler

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// A quota limits how many records there are, in all or of the AI agents with a prefix.
// Before a create writes its intent, it counts the records. Creates of one replica that
// have not written their intents yet are added, so one replica alone never exceeds a
// quota. Several replicas do not see each other's creates between count and intent, so
// together they may exceed it by at most [maxStarting] for each replica but one. If
// creates run at the same time near the quota, one of them may be counted twice and
// another one be refused although it would have fitted.
//
// To count a million records takes seconds. So a count is used again for a while if it is
// far below the limit. Other replicas would have to create more than [minSpare] sessions
// within that time to exceed the quota unseen.

// quotas counts records, in all and for each prefix. The zero value is ready for use.
type quotas struct {
	mu      sync.Mutex
	tallies map[scope]*tally
}

// scope says which limit a count is for. A create counts once for the limit of the server
// and once for that of a rule, so these two are apart even if the rule's prefix is empty.
type scope struct {
	ofRule bool
	prefix string // of the AI agents' IDs
}

const (
	// minSpare is how far below the limit a count must be to be used again, and spareShare
	// the same as a share of the limit: a tenth.
	minSpare   = 1000
	spareShare = 10
	// A count is used again for countFactor times as long as it took, and for maxReuse at
	// most.
	countFactor = 20
	maxReuse    = 10 * time.Second
)

// tally is the last count of the records of one scope.
type tally struct {
	turn    chan struct{} // one token; its holder may use the fields below
	counted time.Time     // when the count began; zero: never
	took    time.Duration // how long the count took
	count   int
	since   int // creates that the count may not include

	mu      sync.Mutex
	pending int // creates that have not written their intents yet
}

// of returns the tally of a scope. There are as many as prefixes in the configuration, and
// one more.
func (q *quotas) of(sc scope) *tally {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.tallies == nil {
		q.tallies = map[scope]*tally{}
	}
	t, ok := q.tallies[sc]
	if !ok {
		t = &tally{turn: make(chan struct{}, 1)}
		q.tallies[sc] = t
	}
	return t
}

// take admits one more create if fewer than limit records are there. Creates that wait
// for a count share the next one. The returned function must be called once the create
// has written its intent, or has failed to.
func (t *tally) take(ctx context.Context, limit int, count func(context.Context) (int, error)) (written func(), ok bool, err error) {
	began := time.Now()
	select {
	case t.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	defer func() { <-t.turn }()
	if !t.counted.After(began) && !t.suffices(limit) {
		counted := time.Now()
		t.mu.Lock()
		since := t.pending
		t.mu.Unlock()
		n, err := count(ctx)
		if err != nil {
			return nil, false, err
		}
		t.counted, t.took, t.count, t.since = counted, time.Since(counted), n, since
	}
	if t.count+t.since >= limit {
		return nil, false, nil
	}
	t.since++
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.pending--
	}, true, nil
}

// suffices reports whether the last count may be used again. The caller has the turn.
func (t *tally) suffices(limit int) bool {
	return t.count+t.since < limit-max(minSpare, limit/spareShare) &&
		time.Since(t.counted) < min(countFactor*t.took, maxReuse)
}

// takeQuota returns a *QuotaError if no more sessions may be created: in all, or under
// each of the rules that allow the create. A session that is replaced makes room for its
// successor. The returned function must be called once the intent is written, or could
// not be.
func (s *Scheduler) takeQuota(ctx context.Context, allowed grants, replaced *Session) (func(), error) {
	written := func() {}
	if s.MaxSessions > 0 && replaced == nil {
		taken, ok, err := s.countedTake(ctx, scope{}, s.MaxSessions)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, &QuotaError{Limit: s.MaxSessions, Scope: "all AI agents"}
		}
		written = taken
	}
	if allowed == nil || slices.ContainsFunc(allowed, func(r AgentRule) bool {
		return r.MaxSessions == 0 || replaced != nil && strings.HasPrefix(replaced.AgentID, r.Prefix)
	}) {
		return written, nil
	}
	var refusal error
	for _, rule := range allowed {
		more, ok, err := s.countedTake(ctx, scope{ofRule: true, prefix: rule.Prefix}, rule.MaxSessions)
		switch {
		case err != nil:
			refusal = err
		case !ok:
			refusal = &QuotaError{Limit: rule.MaxSessions, Scope: fmt.Sprintf("AI agents with the prefix %q", rule.Prefix)}
		default:
			return func() { written(); more() }, nil
		}
	}
	written()
	return nil, refusal
}

func (s *Scheduler) countedTake(ctx context.Context, sc scope, limit int) (written func(), ok bool, err error) {
	return s.quotas.of(sc).take(ctx, limit, func(ctx context.Context) (int, error) {
		return s.Store.CountAgents(ctx, sc.prefix)
	})
}
