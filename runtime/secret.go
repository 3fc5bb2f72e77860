package runtime

import (
	"fmt"
	"io"
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
