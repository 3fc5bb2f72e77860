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
	// maxRequests bounds the concurrent requests, without the event stream. By
	// default Nomad accepts 100 connections from one address, and several replicas
	// may share an address.
	maxRequests = 32
	// maxChecks bounds the concurrent requests of health checks. They have their own
	// limit, so that many health checks do not delay sandboxes.
	maxChecks = 4
)

// ask makes a read request with default consistency, so the leader answers.
func (d *Driver) ask(ctx context.Context, request func(*api.QueryOptions) error) error {
	return d.whileBusy(ctx, "read", d.requests, askLimit, func(ctx context.Context) error {
		return request((&api.QueryOptions{Namespace: d.namespace}).WithContext(ctx))
	})
}

// tell makes a write request.
func (d *Driver) tell(ctx context.Context, request func(*api.WriteOptions) error) error {
	return d.whileBusy(ctx, "write", d.requests, tellLimit, func(ctx context.Context) error {
		return request((&api.WriteOptions{Namespace: d.namespace}).WithContext(ctx))
	})
}

// whileBusy repeats a request while Nomad answers with status 429. Nomad has not
// processed such a request, so it is safe to repeat even a write.
func (d *Driver) whileBusy(ctx context.Context, operation string, places chan struct{}, limit time.Duration, request func(context.Context) error) error {
	pause := backoff.Backoff{Min: 20 * time.Millisecond, Max: maxPause}
	for try := 1; ; try++ {
		err := d.limited(ctx, operation, places, limit, request)
		if statusOf(err) != http.StatusTooManyRequests || try == maxTries {
			return err
		}
		if ended := backoff.Sleep(ctx, pause.Next()); ended != nil {
			return fmt.Errorf("%w, after: %w", ended, err)
		}
	}
}

// limited makes a request once there is a free place in places.
func (d *Driver) limited(ctx context.Context, operation string, places chan struct{}, limit time.Duration, request func(context.Context) error) error {
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	err := request(ctx)
	d.observe(operation, time.Since(began), statusOf(err), err)
	return err
}

// statusOf returns the HTTP status in Nomad's error, or 0 if err is not one.
func statusOf(err error) int {
	if refusal, ok := errors.AsType[api.UnexpectedResponseError](err); ok {
		return refusal.StatusCode()
	}
	return 0
}

// errDenied is returned when Nomad does not know the token, when the token lacks a
// right, or when an operator turned off what was requested. The request has changed
// nothing, and it is no use to repeat it soon.
var errDenied = errors.New("refused by Nomad")

// isDenied reports whether Nomad denied a request; see errDenied.
func isDenied(err error) bool {
	return errors.Is(err, errDenied) || statusOf(err) == http.StatusUnauthorized || statusOf(err) == http.StatusForbidden
}

func isNotFound(err error) bool { return statusOf(err) == http.StatusNotFound }

// isTaken reports whether a registration was refused because the job ID is in use.
func isTaken(err error) bool {
	refusal, ok := errors.AsType[api.UnexpectedResponseError](err)
	return ok && strings.Contains(refusal.Body(), "Enforcing job modify index")
}

// hasNoNamespace reports whether a registration was refused because its namespace
// does not exist. That is not a fault of the job.
func hasNoNamespace(err error) bool {
	refusal, ok := errors.AsType[api.UnexpectedResponseError](err)
	return ok && strings.Contains(refusal.Body(), "is in nonexistent namespace")
}

// isRejected reports whether Nomad found a job invalid. Nomad has no status for
// that, but always lists the errors in the same form.
func isRejected(err error) bool {
	refusal, ok := errors.AsType[api.UnexpectedResponseError](err)
	if !ok {
		return false
	}
	body := refusal.Body()
	return refusal.StatusCode() == http.StatusBadRequest ||
		strings.Contains(body, " error occurred:") || strings.Contains(body, " errors occurred:")
}

// failed returns the error of a failed request. It does not turn ctx's error into
// ErrUnavailable, because that shows nothing about Nomad.
func failed(ctx context.Context, doing string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("nomad: %s: %w", doing, ctx.Err())
	}
	denied := isDenied(err) && !errors.Is(err, errDenied)
	if refusal, ok := errors.AsType[api.UnexpectedResponseError](err); ok && refusal.HasBody() {
		err = fmt.Errorf("answer %d: %s", refusal.StatusCode(), strings.Join(strings.Fields(refusal.Body()), " "))
	}
	if denied {
		err = fmt.Errorf("%w: %w", errDenied, err)
	}
	return fmt.Errorf("nomad: %s: %w: %w", doing, runtime.ErrUnavailable, err)
}
