package consul

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/bivouac/bivouac/scheduler"
)

// agentNames remembers the AI agents of the folders in the agents' index, whose names
// are hashes of the agents' IDs.
type agentNames struct {
	mu    sync.Mutex
	known map[string]string // agent ID by folder
}

// CountAgents implements [scheduler.Store]. It lists the keys of the agents' index, and
// reads one record of each AI agent that it does not know yet.
func (s *Store) CountAgents(ctx context.Context, prefix string) (int, error) {
	count, err := s.countAgents(ctx, prefix)
	if err != nil {
		return 0, fmt.Errorf("consul: count agents: %w", err)
	}
	return count, nil
}

func (s *Store) countAgents(ctx context.Context, prefix string) (int, error) {
	if err := s.identity.stands(ctx); err != nil {
		return 0, err
	}
	keys, _, err := s.list(ctx, s.keys.agents(), "", scheduler.Block{})
	if err != nil || prefix == "" {
		return len(keys), err
	}
	folders := map[string][]string{}
	for _, key := range keys {
		folder, _, _ := strings.Cut(strings.TrimPrefix(key, s.keys.agents()), "/")
		folders[folder] = append(folders[folder], key)
	}
	names, err := s.nameAgents(ctx, folders)
	if err != nil {
		return 0, err
	}
	count := 0
	for folder, entries := range folders {
		if name, ok := names[folder]; ok && strings.HasPrefix(name, prefix) {
			count += len(entries)
		}
	}
	return count, nil
}

// nameAgents returns the AI agent of each folder. A folder whose records have gone
// meanwhile has none.
func (s *Store) nameAgents(ctx context.Context, folders map[string][]string) (map[string]string, error) {
	s.agents.mu.Lock()
	known := maps.Clone(s.agents.known)
	s.agents.mu.Unlock()
	names := make(map[string]string, len(folders))
	unnamed := map[string][]string{}
	for folder, entries := range folders {
		if name, ok := known[folder]; ok {
			names[folder] = name
		} else {
			unnamed[folder] = entries
		}
	}
	// One record of each folder suffices, unless it has gone or cannot be read.
	for len(unnamed) > 0 {
		var next []string
		for folder, entries := range unnamed {
			next = append(next, entries[0])
			if unnamed[folder] = entries[1:]; len(entries) == 1 {
				delete(unnamed, folder)
			}
		}
		for chunk := range slices.Chunk(next, maxOps) {
			sessions, err := s.indexed(ctx, chunk)
			if err != nil {
				return nil, err
			}
			for _, session := range sessions {
				folder := strings.Trim(strings.TrimPrefix(s.keys.agent(session.AgentID), s.keys.agents()), "/")
				names[folder] = session.AgentID
				delete(unnamed, folder)
			}
		}
	}
	s.agents.mu.Lock()
	defer s.agents.mu.Unlock()
	s.agents.known = names // not those of folders that are empty now
	return names, nil
}
