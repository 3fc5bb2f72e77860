package scheduler

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// checkQuota returns a *QuotaError if no more sessions may be created: in all, or under
// each of the rules that allow the create. A session that is replaced is not counted.
func (s *Scheduler) checkQuota(ctx context.Context, allowed grants, replaced *Session) error {
	if s.MaxSessions > 0 && replaced == nil {
		count, err := s.Store.Count(ctx)
		if err != nil {
			return err
		}
		if count >= s.MaxSessions {
			return &QuotaError{Limit: s.MaxSessions, Scope: "all AI agents"}
		}
	}
	if allowed == nil || slices.ContainsFunc(allowed, func(r AgentRule) bool { return r.MaxSessions == 0 }) {
		return nil
	}
	var last error
	for _, rule := range allowed {
		if replaced != nil && strings.HasPrefix(replaced.AgentID, rule.Prefix) {
			return nil
		}
		count, err := s.countAgents(ctx, rule.Prefix)
		if err != nil {
			return err
		}
		if count < rule.MaxSessions {
			return nil
		}
		last = &QuotaError{Limit: rule.MaxSessions, Scope: fmt.Sprintf("AI agents with the prefix %q", rule.Prefix)}
	}
	return last
}

// countAgents counts the sessions of the AI agents whose ID has a prefix.
func (s *Scheduler) countAgents(ctx context.Context, prefix string) (int, error) {
	query := Query{PerPage: MaxPerPage, Include: func(session Session) bool { return strings.HasPrefix(session.AgentID, prefix) }}
	for count := 0; ; {
		page, err := s.Store.List(ctx, query)
		if err != nil {
			return 0, err
		}
		count += len(page.Sessions)
		if query.NextToken = page.NextToken; query.NextToken == "" {
			return count, nil
		}
	}
}
