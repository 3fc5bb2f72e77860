package scheduler

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// The limits of a session's labels.
const (
	MaxLabels     = 16
	MaxLabelKey   = 64  // bytes
	MaxLabelValue = 256 // bytes
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
	if err := checkLabels(cmd.Labels); err != nil {
		return err
	}
	return s.checkTTL(cmd.TTL)
}

// labelKey matches a valid label key.
var labelKey = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]*$`)

// checkLabels checks the keys in sorted order, so that the same labels always give the
// same error.
func checkLabels(labels map[string]string) error {
	const field = "labels"
	if len(labels) > MaxLabels {
		return invalid(field, fmt.Sprintf("has %d entries, at most %d are allowed", len(labels), MaxLabels))
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		value := labels[key]
		switch {
		case len(key) > MaxLabelKey:
			return invalid(field, fmt.Sprintf("has a key of %d bytes, at most %d are allowed: %.64q", len(key), MaxLabelKey, key))
		case !labelKey.MatchString(key):
			return invalid(field, fmt.Sprintf("has key %q: use letters, digits, '.', '_', '/' and '-', and begin with a letter or digit", key))
		case len(value) > MaxLabelValue:
			return invalid(field, fmt.Sprintf("has a value of %d bytes at key %q, at most %d are allowed", len(value), key, MaxLabelValue))
		case !utf8.ValidString(value):
			return invalid(field, fmt.Sprintf("has a value that is not UTF-8 at key %q", key))
		case strings.ContainsFunc(value, unicode.IsControl):
			return invalid(field, fmt.Sprintf("has a value with a control character at key %q", key))
		}
	}
	return nil
}

// checkChatID refuses the nil UUID: the leader uses its lock.
func checkChatID(id uuid.UUID) error {
	if id == uuid.Nil {
		return invalid("chat_id", "is the nil UUID")
	}
	return nil
}

// checkRuntime accepts a configured runtime, or an empty name, which selects the
// default.
func (s *Scheduler) checkRuntime(name string) error {
	if _, ok := s.Drivers[name]; !ok && name != "" {
		return invalid("runtime", fmt.Sprintf("%q is unknown (available: %s)", name, strings.Join(slices.Sorted(maps.Keys(s.Drivers)), ", ")))
	}
	return nil
}

// checkTTL accepts 0, which selects the default.
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
	if err := runtime.ValidateAgentID(id); err != nil {
		return invalid("agent_id", err.Error())
	}
	return nil
}

// checkVolumeHostPath checks only the path's text. The path belongs to the machine that
// will run the sandbox, which may not be this one.
//
// If there are roots, a volume must be directly below one of them. No volume is then
// inside another. No sandbox can write to the parent of a volume, where it could
// replace another session's folder with a symbolic link.
func checkVolumeHostPath(p string, roots []string) error {
	const field = "volume_host_path"
	if err := runtime.ValidateVolumeHostPath(p); err != nil {
		return invalid(field, err.Error())
	}
	if !isVolumeOf(roots, p) {
		return invalid(field, "is not directly below a volume root: it must be ROOT/NAME, where ROOT is one of "+strings.Join(roots, ", "))
	}
	return nil
}

// isVolumeOf reports whether p is directly below one of the roots. Without roots every
// path is.
func isVolumeOf(roots []string, p string) bool {
	return len(roots) == 0 || p != "/" && slices.Contains(roots, path.Dir(p))
}

func invalid(field, why string) error {
	return fmt.Errorf("%w: %s %s", ErrInvalid, field, why)
}
