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
	// maxTries bounds how often a request is made that Nomad refused for too
	// many connections. With the pauses that is about ten seconds.
	maxTries = 16
	maxPause = time.Second
	// How long Nomad may take for an answer. A connection that leads nowhere
	// is noticed by that, and the next request opens another.
	askLimit  = 10 * time.Second
	tellLimit = 30 * time.Second
	// maxRequests is how many requests there are at a time, beside the event
	// stream. Nomad takes 100 connections from one address unless it is told
	// otherwise, on which several replicas may be.
	maxRequests = 32
	// maxChecks is how many more there may be that look after Nomad's health:
	// many who ask for it must not keep sandboxes waiting.
	maxChecks = 4
)

// ask makes a request that reads, with default consistency: the leader answers.
func (d *Driver) ask(ctx context.Context, request func(*api.QueryOptions) error) error {
	return whileBusy(ctx, d.requests, askLimit, func(ctx context.Context) error {
		return request((&api.QueryOptions{Namespace: d.namespace}).WithContext(ctx))
	})
}

// tell makes a request that writes.
func (d *Driver) tell(ctx context.Context, request func(*api.WriteOptions) error) error {
	return whileBusy(ctx, d.requests, tellLimit, func(ctx context.Context) error {
		return request((&api.WriteOptions{Namespace: d.namespace}).WithContext(ctx))
	})
}

// whileBusy repeats a request that Nomad turned away with 429: such a request
// was not looked at, so repeating it is safe, a write too.
func whileBusy(ctx context.Context, places chan struct{}, limit time.Duration, request func(context.Context) error) error {
	pause := backoff.Backoff{Min: 20 * time.Millisecond, Max: maxPause}
	for try := 1; ; try++ {
		err := inTurn(ctx, places, limit, request)
		if statusOf(err) != http.StatusTooManyRequests || try == maxTries {
			return err
		}
		if ended := backoff.Sleep(ctx, pause.Next()); ended != nil {
			return fmt.Errorf("%w, after: %w", ended, err)
		}
	}
}

// inTurn makes a request once there is room for one more.
func inTurn(ctx context.Context, places chan struct{}, limit time.Duration, request func(context.Context) error) error {
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return request(ctx)
}

// statusOf returns the HTTP status of Nomad's refusal, 0 where err is none.
func statusOf(err error) int {
	if refusal, ok := errors.AsType[api.UnexpectedResponseError](err); ok {
		return refusal.StatusCode()
	}
	return 0
}

// errDenied: the token is unknown to Nomad or lacks a right, or an operator
// turned off what was asked for. A request that gets that answer changed nothing,
// and the same one will not do better soon.
var errDenied = errors.New("refused by Nomad")

// isDenied says whether Nomad refused a request for its token, or its kind.
func isDenied(err error) bool {
	return errors.Is(err, errDenied) || statusOf(err) == http.StatusUnauthorized || statusOf(err) == http.StatusForbidden
}

func isNotFound(err error) bool { return statusOf(err) == http.StatusNotFound }

// isTaken says whether a registration was refused because the job ID is in use.
func isTaken(err error) bool {
	refusal, ok := errors.AsType[api.UnexpectedResponseError](err)
	return ok && strings.Contains(refusal.Body(), "Enforcing job modify index")
}

// hasNoNamespace says whether a registration was refused because its namespace
// does not exist. That is no fault of the job.
func hasNoNamespace(err error) bool {
	refusal, ok := errors.AsType[api.UnexpectedResponseError](err)
	return ok && strings.Contains(refusal.Body(), "is in nonexistent namespace")
}

// isRejected says whether Nomad found fault with a job. It has no status of its
// own for that, but always lists the faults in the same form.
func isRejected(err error) bool {
	refusal, ok := errors.AsType[api.UnexpectedResponseError](err)
	if !ok {
		return false
	}
	body := refusal.Body()
	return refusal.StatusCode() == http.StatusBadRequest ||
		strings.Contains(body, " error occurred:") || strings.Contains(body, " errors occurred:")
}

// failed describes a failed request. Errors of ctx stay what they are: they say
// nothing about Nomad.
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
