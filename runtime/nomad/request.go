package nomad

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxTries bounds the tries of a request that Nomad refuses because it has too
	// many connections. With the pauses that takes about ten seconds.
	maxTries = 16
	maxPause = time.Second
	// These limit how long Nomad may take to answer. They also detect a dead
	// connection; the next request then opens another.
	askLimit  = 10 * time.Second
	tellLimit = 30 * time.Second
	// maxRequests bounds the concurrent requests, without the event stream, the question
	// where the helpers are, the checks of Health, the maxLooks questions about tasks and
	// the reads of logs. By default Nomad accepts 100 connections from one address: these
	// 32, one stream, one for the helpers, one check, 8 questions and 16 logs are 59 of them. The rest is for commands in sandboxes, and for
	// other programs at this address.
	maxRequests = 32
)

// Token is the ACL token of requests. It may change at any time.
type Token interface {
	// Value returns the current token.
	Value() string
	// Newer returns a token other than refused, which Nomad did not accept. ok is
	// false if there is none.
	Newer(refused string) (value string, ok bool)
}

// clientToken leaves the token to the API client.
type clientToken struct{}

func (clientToken) Value() string               { return "" }
func (clientToken) Newer(string) (string, bool) { return "", false }

// limits bound the requests of one kind.
type limits struct {
	operation string        // their name for Config.Observe
	places    chan struct{} // one token for each running request; nil: their caller bounds them
	time      time.Duration // 0: a stream, which Config.Observe does not get
}

// ask makes a read request with default consistency, so the leader answers.
func (d *Driver) ask(ctx context.Context, request func(*api.QueryOptions) error) error {
	return d.query(ctx, limits{"read", d.requests, askLimit}, request)
}

// tell makes a write request.
func (d *Driver) tell(ctx context.Context, request func(*api.WriteOptions) error) error {
	err := d.write(ctx, limits{"write", d.requests, tellLimit}, request)
	if isDenied(err) {
		d.mayWrite.Store(nil) // so that Health tries it at once
	}
	return err
}

func (d *Driver) query(ctx context.Context, limits limits, request func(*api.QueryOptions) error) error {
	return d.whileBusy(ctx, limits, func(ctx context.Context, token string) error {
		return request((&api.QueryOptions{Namespace: d.namespace, AuthToken: token}).WithContext(ctx))
	})
}

func (d *Driver) write(ctx context.Context, limits limits, request func(*api.WriteOptions) error) error {
	return d.whileBusy(ctx, limits, func(ctx context.Context, token string) error {
		return request((&api.WriteOptions{Namespace: d.namespace, AuthToken: token}).WithContext(ctx))
	})
}

// whileBusy repeats a request while Nomad answers with status 429. Nomad has not
// processed such a request, so it is safe to repeat even a write.
func (d *Driver) whileBusy(ctx context.Context, limits limits, request func(ctx context.Context, token string) error) error {
	pause := backoff.Backoff{Min: 20 * time.Millisecond, Max: maxPause}
	for try := 1; ; try++ {
		err := d.withToken(ctx, limits, request)
		if statusOf(err) != http.StatusTooManyRequests || try == maxTries {
			return err
		}
		if ended := backoff.Sleep(ctx, pause.Next()); ended != nil {
			return fmt.Errorf("%w, after: %w", ended, err)
		}
	}
}

// withToken makes a request with the current token. If Nomad denies it and there is a
// newer token, withToken repeats it once. Nomad has not processed the first one.
func (d *Driver) withToken(ctx context.Context, limits limits, request func(ctx context.Context, token string) error) error {
	token := d.token.Value()
	err := d.limited(ctx, limits, func(ctx context.Context) error { return request(ctx, token) })
	if !isDenied(err) {
		return err
	}
	newer, ok := d.token.Newer(token)
	if !ok {
		return err
	}
	return d.limited(ctx, limits, func(ctx context.Context) error { return request(ctx, newer) })
}

// limited makes a request once there is a free place for it.
func (d *Driver) limited(ctx context.Context, limits limits, request func(context.Context) error) error {
	if limits.places != nil {
		select {
		case limits.places <- struct{}{}:
			defer func() { <-limits.places }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if limits.time == 0 {
		return request(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, limits.time)
	defer cancel()
	began := time.Now()
	err := request(ctx)
	d.observe(limits.operation, time.Since(began), statusOf(err), err)
	return err
}

// refusal is an answer of Nomad that is an error: an [api.UnexpectedResponseError], or an
// *upgradeError.
type refusal interface {
	error
	StatusCode() int
	Body() string
	HasBody() bool
}

// statusOf returns the HTTP status in Nomad's error, or 0 if err is not one.
func statusOf(err error) int {
	if refused, ok := errors.AsType[refusal](err); ok {
		return refused.StatusCode()
	}
	return 0
}

// bodyOf returns the text of Nomad's error, or "" if err is not one.
func bodyOf(err error) string {
	if refused, ok := errors.AsType[refusal](err); ok {
		return refused.Body()
	}
	return ""
}

// isDenied reports whether Nomad denied a request: it does not know the token, the
// token lacks a right, or an operator turned off what was requested. The request has
// changed nothing, and it is no use to repeat it soon.
func isDenied(err error) bool {
	if errors.Is(err, runtime.ErrPermission) {
		return true
	}
	switch statusOf(err) {
	case http.StatusUnauthorized, http.StatusForbidden:
		return true
	case http.StatusInternalServerError:
		// The Task API's answer to the token of an allocation that has ended. It checks
		// the token before anything else.
		return strings.HasPrefix(bodyOf(err), "Server error authenticating request")
	default:
		return false
	}
}

func isNotFound(err error) bool { return statusOf(err) == http.StatusNotFound }

// isTaken reports whether a registration was refused because the job ID is in use.
func isTaken(err error) bool {
	return strings.Contains(bodyOf(err), "Enforcing job modify index")
}

// hasNoNamespace reports whether a registration was refused because its namespace
// does not exist. That is not a fault of the job.
func hasNoNamespace(err error) bool {
	return strings.Contains(bodyOf(err), "is in nonexistent namespace")
}

// isRejected reports whether Nomad found a job invalid. Nomad has no status for
// that, but always lists the errors in the same form.
func isRejected(err error) bool {
	body := bodyOf(err)
	return statusOf(err) == http.StatusBadRequest ||
		strings.Contains(body, " error occurred:") || strings.Contains(body, " errors occurred:")
}

// failed returns the error of a failed request: ErrPermission if Nomad denied it, and
// otherwise ErrUnavailable. It does not turn ctx's error into one of these, because
// that shows nothing about Nomad.
func failed(ctx context.Context, doing string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("nomad: %s: %w", doing, ctx.Err())
	}
	kind := runtime.ErrUnavailable
	if isDenied(err) {
		kind = runtime.ErrPermission
	}
	if refused, ok := errors.AsType[refusal](err); ok && refused.HasBody() {
		err = fmt.Errorf("answer %d: %s", refused.StatusCode(), strings.Join(strings.Fields(refused.Body()), " "))
	}
	return fmt.Errorf("nomad: %s: %w: %w", doing, kind, err)
}
