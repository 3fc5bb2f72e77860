// Package ready waits until a sandbox answers on its endpoint. It is for Bivouac's
// own drivers and for the drivers of plugin authors.
//
// A [Check] defines what counts as an answer: a TCP connection, or an HTTP
// response, which may have to contain the session ID. [Check.Wait] repeats the
// check until it succeeds, and [Check.Once] makes it once.
//
// The package imports only the standard library and the runtime contract. It does
// not know how a sandbox is run.
package ready

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

const (
	minPause = 2 * time.Millisecond  // shortest pause between two tries
	maxPause = 50 * time.Millisecond // longest pause
	lateness = 32                    // a pause is 1/32 of the time waited so far, so a caller loses 3 % at most
	maxBody  = 4 << 10               // bytes of a response body to look at
	maxQuote = 200                   // bytes of a response body in an error

	// One try, from connect to the last byte, may take a quarter of the time
	// waited so far, within these limits. A packet that is sent before a container's
	// network is up is lost, and TCP repeats it only after a second. A new
	// connection is faster.
	minTry, maxTry = 100 * time.Millisecond, 2 * time.Second
	tryShare       = 4

	// againOpen is how long a second connection has to stay open after one that
	// stayed open for Check.StayOpen.
	againOpen = 250 * time.Millisecond
)

// DockerStayOpen is the StayOpen for a port that Docker publishes. The check must
// begin after the container has started. Docker's proxy accepts each connection
// and only then connects to the container. If nothing listens there, the proxy
// closes the connection. That takes a millisecond, or a second while Linux waits
// for its next ARP request for the container's address. Before the container has
// started it takes as long as the start, so no fixed time would be enough.
const DockerStayOpen = 3 * time.Second

// Check defines what counts as an answer. The zero value accepts any TCP
// connection.
//
// A connection shows that some process listens, but not which one: another process
// may have the port. Behind a proxy, such as Docker's, it shows only that the proxy
// listens, unless StayOpen is set. HTTPPath with WantSessionID proves that the
// sandbox itself answers.
type Check struct {
	// HTTPPath is the path to GET, for example "/healthz". Any 2xx status is an
	// answer. Redirects are not followed. If it is empty, the check uses TCP only.
	HTTPPath string
	// WantSessionID requires the session ID as text in the first 4 KiB of the
	// response body. The request does not contain the ID, so a process that echoes
	// requests does not pass. It requires HTTPPath.
	WantSessionID bool
	// StayOpen is how long a TCP connection must stay open to count as an answer.
	// It counts earlier if the other side sends something. It does not count if the
	// other side closes it, as a proxy does that reaches nothing. So a server must
	// not close a silent connection within this time. With 0 a connection counts at
	// once. It cannot be combined with HTTPPath.
	StayOpen time.Duration
	// Dial opens connections. If it is nil, a [net.Dialer] does. A simulation sets
	// it.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Validate returns an error that wraps [runtime.ErrInvalid] if c asks for
// something impossible.
func (c Check) Validate() error {
	if c.WantSessionID && c.HTTPPath == "" {
		return fmt.Errorf("%w: ready check: WantSessionID requires HTTPPath", runtime.ErrInvalid)
	}
	if c.StayOpen != 0 && c.HTTPPath != "" {
		return fmt.Errorf("%w: ready check: StayOpen cannot be combined with HTTPPath", runtime.ErrInvalid)
	}
	if c.HTTPPath != "" && c.HTTPPath[0] != '/' {
		return fmt.Errorf("%w: ready check: HTTP path %q does not begin with /", runtime.ErrInvalid, c.HTTPPath)
	}
	return nil
}

// Wait returns nil as soon as endpoint answers as c requires. Until then it tries
// again after pauses of 2 ms at first and 50 ms at most. One try takes 2 seconds at
// most, plus the time that a connection must stay open.
//
// When ctx's deadline passes, the error wraps [runtime.ErrNotReady],
// [context.DeadlineExceeded] and the last error. When ctx is cancelled, it wraps
// ctx's error. In both cases [LastTry] returns the last error.
func (c Check) Wait(ctx context.Context, endpoint runtime.Endpoint, sessionID string) error {
	if err := c.check(endpoint, sessionID); err != nil {
		return err
	}

	var last error // of the last try that finished
	for began := time.Now(); ; {
		if ctx.Err() == nil {
			err := c.try(ctx, clamp(time.Since(began)/tryShare, minTry, maxTry), endpoint, sessionID)
			if err == nil {
				return nil
			}
			// A try that ctx cut short shows nothing about the sandbox.
			if !ending(ctx) {
				last = err
			}
		}
		pause := clamp(time.Since(began)/lateness, minPause, maxPause)
		select {
		case <-ctx.Done():
			return ended(ctx, endpoint, last)
		case <-time.After(pause):
		}
	}
}

// ending reports whether ctx has ended or its deadline has passed. Connections
// have their own timer for the deadline and may fail a little before ctx ends.
func ending(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

func ended(ctx context.Context, endpoint runtime.Endpoint, last error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		shown := cmp.Or(last, errNoTry)
		return &waitError{fmt.Errorf("%w: %s did not answer: %w: %w", runtime.ErrNotReady, endpoint.AddrPort(), ctx.Err(), shown), last}
	}
	return &waitError{fmt.Errorf("wait for %s: %w", endpoint.AddrPort(), ctx.Err()), last}
}

var errNoTry = errors.New("no try has finished")

// waitError is the error of a Wait that ended with its context.
type waitError struct {
	error
	last error
}

func (e *waitError) Unwrap() error { return e.error }

// LastTry returns the error of the last try from an error of [Check.Wait]: the error of
// a connection, or the status and the beginning of the body. It returns nil if no try
// has finished or if err is another error.
func LastTry(err error) error {
	if wait, ok := errors.AsType[*waitError](err); ok {
		return wait.last
	}
	return nil
}

func clamp(d, lowest, highest time.Duration) time.Duration { return min(max(d, lowest), highest) }

// Once makes the check once and returns nil if endpoint answers as c requires. It
// takes at most 2 seconds, plus the time that a connection must stay open.
func (c Check) Once(ctx context.Context, endpoint runtime.Endpoint, sessionID string) error {
	if err := c.check(endpoint, sessionID); err != nil {
		return err
	}
	return c.try(ctx, maxTry, endpoint, sessionID)
}

// check returns an error if c, endpoint and sessionID do not go together.
func (c Check) check(endpoint runtime.Endpoint, sessionID string) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if !endpoint.IsValid() {
		return fmt.Errorf("%w: ready check: no endpoint", runtime.ErrInvalid)
	}
	if c.WantSessionID && sessionID == "" {
		return fmt.Errorf("%w: ready check: no session ID", runtime.ErrInvalid)
	}
	return nil
}

func (c Check) try(ctx context.Context, limit time.Duration, endpoint runtime.Endpoint, sessionID string) error {
	if c.HTTPPath != "" {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return c.get(ctx, endpoint, sessionID)
	}
	err := c.connect(ctx, limit, endpoint, c.StayOpen)
	if err == nil && c.StayOpen > 0 {
		// The proxy's own connection may hang because its packets were lost while
		// the container's network was not up. A new one arrives at once.
		err = c.connect(ctx, limit, endpoint, min(c.StayOpen, againOpen))
	}
	return err
}

// connect opens a connection within limit and checks that it stays open.
func (c Check) connect(ctx context.Context, limit time.Duration, endpoint runtime.Endpoint, stayOpen time.Duration) error {
	dial := c.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	dialCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := dial(dialCtx, "tcp", endpoint.AddrPort().String())
	if err != nil {
		return err
	}
	if stayOpen > 0 {
		err = staysOpen(ctx, conn, stayOpen)
	}
	return errors.Join(err, conn.Close())
}

// staysOpen returns nil once the other side sends something or stayOpen has passed.
// It returns an error if the other side closes the connection first.
func staysOpen(ctx context.Context, conn net.Conn, stayOpen time.Duration) error {
	if err := conn.SetReadDeadline(time.Now().Add(stayOpen)); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })() // fails only if conn is closed
	n, err := conn.Read(make([]byte, 1))
	switch {
	case n > 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil
	default:
		return fmt.Errorf("the connection was closed; a proxy does that if nothing listens behind it: %w", err)
	}
}

func (c Check) get(ctx context.Context, endpoint runtime.Endpoint, sessionID string) error {
	url := "http://" + endpoint.AddrPort().String() + c.HTTPPath
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	// Each try opens a new connection, because one from before the sandbox was up
	// may lead nowhere. RoundTrip does not follow redirects, and it does not use the
	// environment's proxy.
	transport := &http.Transport{DialContext: c.Dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10}
	resp, err := transport.RoundTrip(req)
	// The third is net/http's, which has no value for it: the connection was closed before
	// the request was sent.
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || err != nil && strings.Contains(err.Error(), "server closed idle connection") {
		err = fmt.Errorf("the connection was closed without an answer: %w", err)
	}
	if err != nil {
		return fmt.Errorf("GET %s: %w", c.HTTPPath, err)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if closeErr := resp.Body.Close(); err == nil {
		err = closeErr
	}
	switch {
	case err != nil:
		return fmt.Errorf("GET %s: %w", c.HTTPPath, err)
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		return fmt.Errorf("GET %s: %s%s", c.HTTPPath, resp.Status, quote(body))
	case c.WantSessionID && !bytes.Contains(body, []byte(sessionID)):
		return fmt.Errorf("GET %s: the response does not contain the session ID: another process has this port%s", c.HTTPPath, quote(body))
	}
	return nil
}

// quote returns the beginning of a response body for an error, in quotes and without
// control characters.
func quote(body []byte) string {
	text := strings.TrimSpace(string(body[:min(len(body), maxQuote)]))
	if text == "" {
		return ""
	}
	return fmt.Sprintf(": %q", text)
}
