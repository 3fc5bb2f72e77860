// Package ready waits until a sandbox answers on its endpoint.
//
// It serves the drivers that come with Bivouac and those of plugin authors, so
// it imports the standard library and the runtime contract alone. It must never
// know how a sandbox is run.
package ready

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

const (
	minPause = 2 * time.Millisecond  // between two tries, at first
	maxPause = 50 * time.Millisecond // and at last
	lateness = 32                    // between them, a pause is this part of the time waited: what a caller loses by it is 3 % at most
	maxBody  = 4 << 10               // bytes of an answer that are looked at

	// One try, from connect to the last byte, may take a quarter of the time
	// waited, within these. A packet that is sent before a container's network
	// is up is lost, and is repeated by TCP only after a second: it pays to
	// hang up and call again.
	minTry, maxTry = 100 * time.Millisecond, 2 * time.Second
	tryShare       = 4

	// againOpen is how long a second connection has to stay open after one that
	// stayed open for Check.StayOpen.
	againOpen = 250 * time.Millisecond
)

// DockerStayOpen is the StayOpen of a port that Docker publishes, for a check that
// begins once the container has started. Docker's proxy takes each connection,
// and only then calls the container. If nobody listens there, it hangs up. That
// takes a millisecond, or a second while Linux still waits for its next look for
// the container's address. Before the container has started it takes as long as
// the start, so that no time would do.
const DockerStayOpen = 3 * time.Second

// Check says what counts as an answer. The zero value is content with a TCP
// connection.
//
// A connection shows that somebody listens, not who: another process may hold
// the port. Behind a proxy, such as Docker's, it shows only that the proxy
// listens, unless StayOpen is set. HTTPPath with WantSessionID leaves no such
// doubt.
type Check struct {
	// HTTPPath is asked for with GET, for example "/healthz". Any 2xx status
	// is an answer; redirects are not followed. Empty means TCP only.
	HTTPPath string
	// WantSessionID asks that the first 4 KiB of the answer's body hold the
	// session's ID as text. The request does not carry the ID, so a process
	// that only echoes requests does not pass. It needs HTTPPath.
	WantSessionID bool
	// StayOpen is how long a connection has to stay open to count, if the other
	// side sends nothing; as soon as it sends something, the connection counts.
	// One that the other side closes does not: a proxy does that if it reaches
	// nobody. A server that hangs up on callers who say nothing must not do so
	// within this time. 0: a connection counts at once. It is for TCP alone.
	StayOpen time.Duration
	// Dial opens connections where that is not a [net.Dialer]'s to do, as in
	// a simulation. Nil: a net.Dialer does.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Validate returns an error that wraps [runtime.ErrInvalid] if c asks for
// something impossible.
func (c Check) Validate() error {
	if c.WantSessionID && c.HTTPPath == "" {
		return fmt.Errorf("%w: ready check: a session ID can only be asked for with an HTTP path", runtime.ErrInvalid)
	}
	if c.StayOpen != 0 && c.HTTPPath != "" {
		return fmt.Errorf("%w: ready check: StayOpen is for TCP, and there is an HTTP path", runtime.ErrInvalid)
	}
	if c.HTTPPath != "" && c.HTTPPath[0] != '/' {
		return fmt.Errorf("%w: ready check: HTTP path %q does not begin with /", runtime.ErrInvalid, c.HTTPPath)
	}
	return nil
}

// Wait returns nil as soon as endpoint answers as c asks. Until then it tries
// again after short pauses, of 2 ms at first and 50 ms at most; one try takes
// 2 seconds at most, beside the time that a connection has to stay open.
//
// When ctx's deadline passes, the error wraps [runtime.ErrNotReady],
// [context.DeadlineExceeded] and what went wrong last. When ctx is cancelled,
// it wraps ctx's error.
func (c Check) Wait(ctx context.Context, endpoint runtime.Endpoint, sessionID string) error {
	if err := c.check(endpoint, sessionID); err != nil {
		return err
	}

	last := errors.New("no try was finished")
	for began := time.Now(); ; {
		if ctx.Err() == nil {
			err := c.try(ctx, clamp(time.Since(began)/tryShare, minTry, maxTry), endpoint, sessionID)
			if err == nil {
				return nil
			}
			// A try that ctx itself cut short says nothing about the sandbox.
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

// ending says whether ctx has ended or is at its deadline, which connections
// keep by a timer of their own.
func ending(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

func ended(ctx context.Context, endpoint runtime.Endpoint, last error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s did not answer: %w: %w", runtime.ErrNotReady, endpoint.AddrPort(), ctx.Err(), last)
	}
	return fmt.Errorf("wait for %s: %w", endpoint.AddrPort(), ctx.Err())
}

func clamp(d, lowest, highest time.Duration) time.Duration { return min(max(d, lowest), highest) }

// Once asks endpoint once and returns nil if it answers as c asks. It takes 2
// seconds at most.
func (c Check) Once(ctx context.Context, endpoint runtime.Endpoint, sessionID string) error {
	if err := c.check(endpoint, sessionID); err != nil {
		return err
	}
	return c.try(ctx, maxTry, endpoint, sessionID)
}

// check refuses a question that cannot be asked.
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
		// The proxy's call may have been lost while the container's network was
		// not up, and be repeated ever more rarely. A new one arrives at once.
		err = c.connect(ctx, limit, endpoint, min(c.StayOpen, againOpen))
	}
	return err
}

// connect opens a connection within limit, which then has to stay open.
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

// staysOpen waits for the other side to say something, or to say nothing for a
// time, and fails if it hangs up.
func staysOpen(ctx context.Context, conn net.Conn, stayOpen time.Duration) error {
	if err := conn.SetReadDeadline(time.Now().Add(stayOpen)); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })() // a closed one needs none
	n, err := conn.Read(make([]byte, 1))
	switch {
	case n > 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil
	default:
		return fmt.Errorf("the connection was closed, as a proxy does if nobody listens behind it: %w", err)
	}
}

func (c Check) get(ctx context.Context, endpoint runtime.Endpoint, sessionID string) error {
	url := "http://" + endpoint.AddrPort().String() + c.HTTPPath
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	// Each try has a connection of its own: one that was opened before the
	// sandbox was up may lead nowhere. RoundTrip neither follows redirects nor
	// uses the environment's proxy.
	transport := &http.Transport{DialContext: c.Dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if closeErr := resp.Body.Close(); err == nil {
		err = closeErr
	}
	switch {
	case err != nil:
		return fmt.Errorf("GET %s: %w", c.HTTPPath, err)
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		return fmt.Errorf("GET %s: %s", c.HTTPPath, resp.Status)
	case c.WantSessionID && !bytes.Contains(body, []byte(sessionID)):
		return fmt.Errorf("GET %s: the answer does not hold the session's ID: something else has this port", c.HTTPPath)
	}
	return nil
}
