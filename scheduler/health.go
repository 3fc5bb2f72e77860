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
)

// orphanPatience is how long a sandbox may be without a record before Health
// tells of it, where nothing has to be decided by a person.
const orphanPatience = 10 * time.Minute

// maxTold is how many findings of one kind Health spells out.
const maxTold = 5

// findings is what the last passes of the leading replica left for an operator
// to decide. Its zero value is empty.
type findings struct {
	mu      sync.Mutex
	damaged map[string][]DamagedRecord // by the runtime whose pass found them: each reads all records
	orphans map[string][]Orphan        // by runtime
}

// set replaces what is known from a runtime's passes.
func (f *findings) set(runtime string, damaged []DamagedRecord, orphans []Orphan) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.damaged == nil {
		f.damaged, f.orphans = make(map[string][]DamagedRecord), make(map[string][]Orphan)
	}
	f.damaged[runtime], f.orphans[runtime] = damaged, orphans
}

func (f *findings) clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.damaged)
	clear(f.orphans)
}

// Health returns an error if an operator has to decide something, with the commands for
// it: about damaged records, and about sandboxes without a record that can be neither
// adopted nor stopped. It reports what the last passes found, so it knows these only in
// the replica that is the leader.
func (s *Scheduler) Health(context.Context) error {
	s.findings.mu.Lock()
	defer s.findings.mu.Unlock()
	damaged := make(map[uuid.UUID]string)
	for _, records := range s.findings.damaged {
		for _, r := range records {
			damaged[r.ChatID] = fmt.Sprintf("the record of chat %s cannot be understood (%v): run: bivouac operator repair %s", r.ChatID, r.Err, r.ChatID)
		}
	}
	var orphans []string
	for _, name := range slices.Sorted(maps.Keys(s.findings.orphans)) {
		for _, o := range s.findings.orphans[name] {
			chatID, err := uuid.Parse(o.ChatID)
			if _, told := damaged[chatID]; err == nil && told {
				continue
			}
			if isDecided(o.err) || s.Now().Sub(o.since) >= orphanPatience {
				orphans = append(orphans, fmt.Sprintf("sandbox %s of chat %s in runtime %s has no record: %s", o.ContainerID, o.ChatID, o.Runtime, o.Reason))
			}
		}
	}
	all := append(shortened(slices.Sorted(maps.Values(damaged)), "damaged records"), shortened(orphans, "sandboxes without a record")...)
	if len(all) == 0 {
		return nil
	}
	return errors.New(strings.Join(all, "; "))
}

// isDecided says whether an error will be the same at the next pass.
func isDecided(err error) bool { return errors.Is(err, ErrInvalid) || errors.Is(err, ErrDamaged) }

// shortened returns the first of some lines, and how many more of what there are.
func shortened(lines []string, what string) []string {
	if len(lines) <= maxTold {
		return lines
	}
	return append(lines[:maxTold:maxTold], fmt.Sprintf("and %d more %s", len(lines)-maxTold, what))
}
