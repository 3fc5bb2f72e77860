package scheduler

import (
	"strings"
	"unicode"

	"github.com/bivouac/bivouac/runtime"
)

// oneLine returns text as one line that a terminal can show: without control characters
// and without characters that change the direction of text.
func oneLine(text string) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "\uFFFD")), " ")
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			return '\uFFFD'
		}
		return r
	}, text)
	if len(text) <= maxTextBytes {
		return text
	}
	return strings.ToValidUTF8(text[:maxTextBytes-len("…")], "") + "…"
}

// hidingToken returns an error without the access token in its text.
func hidingToken(err error, token runtime.Secret) error {
	if err == nil || token == "" || !strings.Contains(err.Error(), string(token)) {
		return err
	}
	return &hiddenTokenError{err, token}
}

type hiddenTokenError struct {
	err   error
	token runtime.Secret
}

func (e *hiddenTokenError) Error() string { return e.token.HideIn(e.err.Error()) }
func (e *hiddenTokenError) Unwrap() error { return e.err }
