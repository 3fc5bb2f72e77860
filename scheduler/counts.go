package scheduler

import (
	"context"
	"fmt"
	"time"
)

// States returns all states of a session, in the order of its life.
func States() []State {
	return []State{StateCreating, StateRunning, StateStopping, StateDead, StateLost}
}

// Counts is the number of sessions in each state. It has all states.
type Counts map[State]int

// Counts are used for countsLast before the sessions are counted again, or for countFactor
// times as long as it took to count them.
const countsLast = 5 * time.Second

// counting holds the last counts. All callers share them, because to count the sessions
// reads all records.
type counting struct {
	turn    chan struct{} // its holder may use the other fields
	at      time.Time     // zero: never counted
	took    time.Duration
	byAgent map[string]map[State]int // by AI agent
}

// Counts returns how many sessions that the caller may see are recorded in each state,
// and when they were counted: at most 5 seconds ago, or 20 times as long ago as it took to
// count them. With an agentID it counts only the sessions of that AI agent. It returns
// ErrPermissionDenied if the caller may not see those. Records that cannot be read are not
// counted.
func (s *Scheduler) Counts(ctx context.Context, agentID string) (Counts, time.Time, error) {
	caller := CallerFrom(ctx)
	if agentID != "" {
		if err := caller.require(CapRead, agentID); err != nil {
			return nil, time.Time{}, fmt.Errorf("counts: %w", err)
		}
	}
	select {
	case s.counting.turn <- struct{}{}:
		defer func() { <-s.counting.turn }()
	case <-ctx.Done():
		return nil, time.Time{}, fmt.Errorf("counts: %w", ctx.Err())
	}
	if s.counting.at.IsZero() || time.Since(s.counting.at) >= max(countsLast, countFactor*s.counting.took) {
		if err := s.count(ctx); err != nil {
			return nil, time.Time{}, fmt.Errorf("counts: %w", err)
		}
	}
	counts := Counts{}
	for _, state := range States() {
		counts[state] = 0
	}
	for agent, states := range s.counting.byAgent {
		if agentID != "" && agent != agentID || !caller.May(CapRead, agent) {
			continue
		}
		for state, n := range states {
			counts[state] += n
		}
	}
	return counts, s.counting.at, nil
}

// count counts all sessions. The caller has the turn.
func (s *Scheduler) count(ctx context.Context) error {
	began := time.Now()
	byAgent := map[string]map[State]int{}
	for shard := 0; shard < Shards; {
		part, next, err := s.Store.Scan(ctx, shard)
		if err != nil {
			return err
		}
		shard = next
		for _, session := range part.Sessions {
			if byAgent[session.AgentID] == nil {
				byAgent[session.AgentID] = map[State]int{}
			}
			byAgent[session.AgentID][session.State]++
		}
	}
	s.counting.byAgent, s.counting.at = byAgent, time.Now()
	s.counting.took = s.counting.at.Sub(began)
	return nil
}
