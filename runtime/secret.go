package runtime

import (
	"fmt"
	"io"
	"strings"
)

// Secret is text that must not be shown to people. Packages fmt, encoding/json and
// log/slog print it as "redacted", or as "" if it is empty. Convert it to a string to
// use it.
//
// Package fmt cannot protect a Secret below an unexported field. Do not print a struct
// that has a Secret or a [Spec] in one.
type Secret string

// String returns "redacted", or "" if s is empty.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "redacted"
}

// Format implements [fmt.Formatter]: every verb prints what String returns.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// MarshalText implements [encoding.TextMarshaler]: it returns what String returns.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// HideIn returns text without the secret, which a sandbox may have printed. It calls the
// secret an access token, the only kind that sandboxes have.
func (s Secret) HideIn(text string) string {
	if s == "" {
		return text
	}
	return strings.ReplaceAll(text, string(s), "[access token]")
}
