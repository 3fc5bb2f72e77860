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
	known map[string]string // agent ID by the key of the folder
}

// CountAgents implements [scheduler.Store]. With the empty prefix it lists the keys of all
// records, some thousand at a time. Otherwise it lists the agents' index: in one request if
// that has few entries, else the AI agents, and then the parts of the index with an AI
// agent that has the prefix. It reads one record of each AI agent that it does not know yet.
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
	if prefix == "" {
		return s.countRecords(ctx)
	}
	parts, err := s.agentParts(ctx, prefix)
	if err != nil {
		return 0, err
	}
	count := 0
	for _, part := range parts {
		keys, _, err := s.list(ctx, part, "", scheduler.Block{})
		if err != nil {
			return 0, err
		}
		folders := map[string][]string{}
		for _, key := range keys {
			folder := key[:strings.LastIndexByte(key, '/')+1]
			folders[folder] = append(folders[folder], key)
		}
		names, err := s.nameAgents(ctx, folders)
		if err != nil {
			return 0, err
		}
		if part == s.keys.agents() { // these are all
			s.agents.mu.Lock()
			s.agents.known = maps.Clone(names)
			s.agents.mu.Unlock()
		}
		for folder, entries := range folders {
			if name, ok := names[folder]; ok && strings.HasPrefix(name, prefix) {
				count += len(entries)
			}
		}
	}
	return count, nil
}

// listedAtOnce is about how many index entries are listed in one request at most.
const listedAtOnce = 65_536

// agentParts returns the prefixes of the parts of the agents' index in which an AI agent
// with the prefix may have entries. A part is the whole index if that is small, and
// otherwise has the AI agents whose hashes begin with the same two digits.
func (s *Store) agentParts(ctx context.Context, prefix string) ([]string, error) {
	sample, _, err := s.list(ctx, s.keys.shard(0), "", scheduler.Block{})
	if err != nil {
		return nil, err
	}
	if len(sample)*scheduler.Shards <= listedAtOnce {
		return []string{s.keys.agents()}, nil
	}
	folders, _, err := s.list(ctx, s.keys.agents(), "/", scheduler.Block{})
	if err != nil {
		return nil, err
	}
	s.agents.mu.Lock()
	defer s.agents.mu.Unlock()
	known := make(map[string]string, len(folders)) // not those of folders that are empty now
	var parts []string
	for _, folder := range folders {
		name, ok := s.agents.known[folder]
		if ok {
			known[folder] = name
		}
		if !ok || strings.HasPrefix(name, prefix) {
			parts = append(parts, folder[:min(len(s.keys.agents())+2, len(folder))])
		}
	}
	s.agents.known = known
	return slices.Compact(parts), nil // the folders are in order
}

// nameAgents returns the AI agent of each folder. A folder whose records have gone
// meanwhile has none.
func (s *Store) nameAgents(ctx context.Context, folders map[string][]string) (map[string]string, error) {
	names := make(map[string]string, len(folders))
	unnamed := map[string][]string{}
	s.agents.mu.Lock()
	for folder, entries := range folders {
		if name, ok := s.agents.known[folder]; ok {
			names[folder] = name
		} else {
			unnamed[folder] = entries
		}
	}
	s.agents.mu.Unlock()
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
				folder := s.keys.agent(session.AgentID)
				names[folder] = session.AgentID
				delete(unnamed, folder)
			}
		}
	}
	s.agents.mu.Lock()
	defer s.agents.mu.Unlock()
	if s.agents.known == nil {
		s.agents.known = make(map[string]string, len(names))
	}
	maps.Copy(s.agents.known, names)
	return names, nil
}
