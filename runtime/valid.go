package runtime

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The limits of what a [Spec] may hold, in bytes.
const (
	MaxAgentID        = 256
	MaxVolumeHostPath = 4096
)

// ValidName reports whether name is valid for a driver, a plugin or an instance: 1 to
// 64 bytes of a-z, 0-9 and '-', not beginning with '-'.
func ValidName(name string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	return name != "" && len(name) <= 64 && name[0] != '-' && strings.Trim(name, letters+"-") == ""
}

// Validate returns what is wrong with the spec for any driver.
func (s Spec) Validate() error {
	errs := []error{s.validateUse()}
	if !isUUID(s.SessionID) {
		errs = append(errs, fmt.Errorf("session ID %q is not a UUID in lower case", s.SessionID))
	}
	if s.AccessToken != "" && !isAccessToken(string(s.AccessToken)) {
		errs = append(errs, errors.New("access token is not 64 hexadecimal digits in lower case"))
	}
	return errors.Join(errs...)
}

// validateUse returns what is wrong with what the sandbox is for: a chat or a pool.
func (s Spec) validateUse() error {
	if s.Pool != "" {
		switch {
		case !ValidName(s.Pool):
			return fmt.Errorf("pool %q is not a valid name", s.Pool)
		case s.ChatID != "" || s.AgentID != "" || s.VolumeHostPath != "":
			return errors.New("a spare has no chat, agent ID or volume host path")
		}
		return nil
	}
	var errs []error
	if !isUUID(s.ChatID) {
		errs = append(errs, fmt.Errorf("chat ID %q is not a UUID in lower case", s.ChatID))
	}
	if err := ValidateAgentID(s.AgentID); err != nil {
		errs = append(errs, fmt.Errorf("agent ID %w", err))
	}
	if err := ValidateVolumeHostPath(s.VolumeHostPath); err != nil {
		errs = append(errs, fmt.Errorf("volume host path %w", err))
	}
	return errors.Join(errs...)
}

// Validate returns what is wrong with the command for any driver.
func (c Command) Validate() error {
	if len(c.Args) == 0 || c.Args[0] == "" {
		return errors.New("there is no command")
	}
	if c.Dir != "" && !path.IsAbs(c.Dir) {
		return fmt.Errorf("folder %q is not absolute", c.Dir)
	}
	texts := append([]string{c.Dir, c.User, c.Task}, c.Args...)
	for name, value := range c.Env {
		if !isVariable(name) {
			return fmt.Errorf("variable %q must have letters, digits and '_', and not begin with a digit", name)
		}
		texts = append(texts, value)
	}
	for _, text := range texts {
		if strings.Contains(text, "\x00") {
			return errors.New("a NUL byte is not allowed")
		}
	}
	return nil
}

func isVariable(name string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
	return name != "" && strings.ContainsAny(name[:1], letters) && strings.Trim(name, letters+"0123456789") == ""
}

// ValidateAgentID returns what is wrong with an agent ID. The error's text follows the
// field's name, for example "is empty".
func ValidateAgentID(id string) error { return validateText(id, MaxAgentID) }

// ValidateVolumeHostPath returns what is wrong with the path of a volume, as
// [ValidateAgentID] does. It checks only the text, because the path belongs to the
// machine that will run the sandbox.
func ValidateVolumeHostPath(p string) error {
	err := validateText(p, MaxVolumeHostPath)
	switch {
	case err != nil:
		return err
	case !path.IsAbs(p):
		return errors.New("is not absolute")
	case path.Clean(p) != p:
		return errors.New("is not clean: it has '.', '..', a double or a trailing slash")
	}
	return nil
}

// validateText accepts text that fits into a log line and in which Nomad has nothing to
// interpolate.
func validateText(s string, limit int) error {
	switch {
	case s == "":
		return errors.New("is empty")
	case len(s) > limit:
		return fmt.Errorf("is over %d bytes", limit)
	case !utf8.ValidString(s):
		return errors.New("is not UTF-8")
	case strings.ContainsFunc(s, unicode.IsControl):
		return errors.New("has a control character")
	case strings.Contains(s, "${"), strings.Contains(s, "%{"):
		return errors.New(`has "${" or "%{", which are reserved`)
	}
	return nil
}

func isAccessToken(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		hex := '0' <= c && c <= '9' || 'a' <= c && c <= 'f'
		if dash && c != '-' || !dash && !hex {
			return false
		}
	}
	return true
}
