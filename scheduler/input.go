package scheduler

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
)

// The limits of what a create may name, in bytes.
const (
	MaxAgentID        = 256
	MaxVolumeHostPath = 4096
)

// MinTTL is the shortest TTL of a session. A shorter session might end before its caller
// learns of it.
const MinTTL = 5 * time.Second

func (s *Scheduler) checkCreate(cmd CreateCommand) error {
	if err := checkChatID(cmd.ChatID); err != nil {
		return err
	}
	if err := checkAgentID(cmd.AgentID); err != nil {
		return err
	}
	if err := checkVolumeHostPath(cmd.VolumeHostPath, s.VolumeRoots); err != nil {
		return err
	}
	if err := s.checkRuntime(cmd.Runtime); err != nil {
		return err
	}
	return s.checkTTL(cmd.TTL)
}

// checkChatID refuses the UUID that is nobody's: its lock is the leader's.
func checkChatID(id uuid.UUID) error {
	if id == uuid.Nil {
		return invalid("chat_id", "is the nil UUID")
	}
	return nil
}

// checkRuntime accepts an empty name, which leaves the choice to the scheduler.
func (s *Scheduler) checkRuntime(name string) error {
	if _, ok := s.Drivers[name]; !ok && name != "" {
		return invalid("runtime", fmt.Sprintf("%q is unknown (available: %s)", name, strings.Join(slices.Sorted(maps.Keys(s.Drivers)), ", ")))
	}
	return nil
}

// checkTTL accepts 0, which stands for the default.
func (s *Scheduler) checkTTL(ttl time.Duration) error {
	switch {
	case ttl < 0:
		return invalid("ttl", "is negative")
	case ttl != 0 && ttl < MinTTL:
		return invalid("ttl", fmt.Sprintf("is under the minimum of %s", MinTTL))
	case ttl > s.MaxTTL:
		return invalid("ttl", fmt.Sprintf("is over the maximum of %s", s.MaxTTL))
	}
	return nil
}

func checkAgentID(id string) error {
	switch {
	case id == "":
		return invalid("agent_id", "is empty")
	case len(id) > MaxAgentID:
		return invalid("agent_id", fmt.Sprintf("is over %d bytes", MaxAgentID))
	case !utf8.ValidString(id):
		return invalid("agent_id", "is not UTF-8")
	case strings.ContainsFunc(id, unicode.IsControl):
		return invalid("agent_id", "has a control character")
	}
	return nil
}

// checkVolumeHostPath checks the name of a volume, and nothing else: the path is
// one of the machine that will run the sandbox, which need not be this one.
//
// If there are roots, a volume is directly below one of them. No sandbox can then
// write to the parent of a volume, to put a symbolic link where another session
// expects its own folder, and no volume is inside another.
func checkVolumeHostPath(p string, roots []string) error {
	const field = "volume_host_path"
	switch {
	case p == "":
		return invalid(field, "is empty")
	case len(p) > MaxVolumeHostPath:
		return invalid(field, fmt.Sprintf("is over %d bytes", MaxVolumeHostPath))
	case !utf8.ValidString(p):
		return invalid(field, "is not UTF-8")
	case strings.ContainsFunc(p, unicode.IsControl):
		return invalid(field, "has a control character")
	case strings.Contains(p, "${"):
		return invalid(field, `has "${", which is reserved`)
	case !path.IsAbs(p):
		return invalid(field, "is not absolute")
	case path.Clean(p) != p:
		return invalid(field, "is not clean: it has '.', '..', a double or a trailing slash")
	}
	if len(roots) > 0 && (p == "/" || !slices.Contains(roots, path.Dir(p))) {
		return invalid(field, "is not directly below a volume root: it must be ROOT/NAME, where ROOT is one of "+strings.Join(roots, ", "))
	}
	return nil
}

func invalid(field, why string) error {
	return fmt.Errorf("%w: %s %s", ErrInvalid, field, why)
}
