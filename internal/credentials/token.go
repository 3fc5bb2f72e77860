package credentials

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

const (
	// maxToken bounds a token file, in bytes.
	maxToken = 16 << 10
	// settle is how long a changed file must stay the same before it is used, because
	// its writer may not be done. maxReads bounds how often it is read for that.
	settle   = 20 * time.Millisecond
	maxReads = 10
	// newerEvery is how often [Token.Newer] reads the file.
	newerEvery = time.Second
)

// Token is a secret that is sent with each request. It may be in a file that changes. Its
// methods may be called concurrently.
type Token struct {
	path string // empty: the value never changes

	reading chan struct{} // contains a value while the file is read; simulated time goes on while others wait
	tried   time.Time     // when Newer last read the file

	mu    sync.Mutex
	value string
}

// NewToken returns a token that never changes. It may be empty, for requests without a
// token.
func NewToken(value string) *Token { return &Token{value: value} }

// TokenFile returns the token in a file. It returns an error if the file contains none
// now. Space around the token is not part of it.
func TokenFile(path string) (*Token, error) {
	t := &Token{path: path, reading: make(chan struct{}, 1)}
	if _, err := t.Reload(); err != nil {
		return nil, err
	}
	return t, nil
}

// Value returns the current token.
func (t *Token) Value() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.value
}

// Reload reads the file again and reports whether it contains another token. If the file
// cannot be read or contains no token, the value stays. Errors contain no token.
func (t *Token) Reload() (changed bool, err error) {
	if t.path == "" {
		return false, nil
	}
	t.reading <- struct{}{}
	defer func() { <-t.reading }()
	return t.reload()
}

// Newer returns a token other than refused, which a server did not accept. If there is
// none yet, Newer reads the file again, at most once per second. ok is false if there is
// still none.
func (t *Token) Newer(refused string) (value string, ok bool) {
	if value := t.Value(); value != refused || t.path == "" {
		return value, value != refused
	}
	t.reading <- struct{}{}
	defer func() { <-t.reading }()
	if t.Value() == refused && time.Since(t.tried) >= newerEvery {
		t.tried = time.Now()
		_, _ = t.reload() // a Watcher reports a file that cannot be read
	}
	value = t.Value()
	return value, value != refused
}

func (t *Token) set(value string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.value = value
}

// reload is Reload for a caller that has put a value into reading.
func (t *Token) reload() (changed bool, err error) {
	current := []byte(t.Value())
	next, err := readToken(t.path)
	for reads := 1; err == nil && !bytes.Equal(next, current); reads++ {
		if reads == maxReads {
			return false, fmt.Errorf("credentials: token file %s changes all the time", t.path)
		}
		<-time.After(settle)
		var again []byte
		if again, err = readToken(t.path); err == nil && bytes.Equal(again, next) {
			t.set(string(next))
			return true, nil
		}
		next = again
	}
	if err != nil {
		return false, fmt.Errorf("credentials: token file: %w", err)
	}
	return false, nil
}

func readToken(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // only read
	text, err := io.ReadAll(io.LimitReader(file, maxToken+1))
	if err != nil {
		return nil, err
	}
	token := bytes.TrimSpace(text)
	switch {
	case len(text) > maxToken:
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxToken)
	case len(token) == 0:
		return nil, fmt.Errorf("%s is empty", path)
	case bytes.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return nil, errors.New(path + " must contain one token and nothing else")
	}
	return token, nil
}
