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
// reports it, unless a person has to decide something.
const orphanPatience = 10 * time.Minute

// maxTold is how many findings of one kind Health spells out.
const maxTold = 5

// findings is what the last passes of the leading replica left for an operator
// to decide. Its zero value is empty.
type findings struct {
	mu      sync.Mutex
	damaged map[string][]DamagedRecord // by the runtime whose pass found them: each reads all records
	orphans map[string][]Orphan        // by runtime
	newer   map[uuid.UUID]bool         // chats whose newer records the log has reported
}

// unreported returns those of the records that are of a newer version and that
// it did not return before. It forgets the chats that have no such record.
func (f *findings) unreported(records []DamagedRecord) []DamagedRecord {
	f.mu.Lock()
	defer f.mu.Unlock()
	newer := make(map[uuid.UUID]bool)
	var fresh []DamagedRecord
	for _, r := range records {
		if !errors.Is(r.Err, ErrNewerRecord) {
			continue
		}
		newer[r.ChatID] = true
		if !f.newer[r.ChatID] {
			fresh = append(fresh, r)
		}
	}
	f.newer = newer
	return fresh
}

// reportNewerRecords logs each record of a newer version once.
func (s *Scheduler) reportNewerRecords(records []DamagedRecord) {
	for _, r := range s.findings.unreported(records) {
		s.Logger.Warn("record_newer", "chat_id", r.ChatID.String(), "error", Kind(r.Err), "detail", r.Err)
	}
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
// it: about records that are damaged or of a newer version, about sandboxes without
// a record that can be neither adopted nor stopped, and about pools that cannot be filled.
// It reports what the last passes found, so it knows these only in the replica that is the
// leader.
func (s *Scheduler) Health(context.Context) error {
	s.findings.mu.Lock()
	defer s.findings.mu.Unlock()
	damaged := make(map[uuid.UUID]string)
	for _, records := range s.findings.damaged {
		for _, r := range records {
			if errors.Is(r.Err, ErrNewerRecord) {
				damaged[r.ChatID] = fmt.Sprintf("the record of chat %s is of a newer version (%v): upgrade this replica", r.ChatID, r.Err)
				continue
			}
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
	all := append(s.filling.problems(), shortened(slices.Sorted(maps.Values(damaged)), "damaged records")...)
	all = append(all, shortened(orphans, "sandboxes without a record")...)
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
