package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// requestTimeout bounds one request, and all tries of one together.
	requestTimeout = 5 * time.Second
	// maxTries bounds how often a request is made that may be repeated. Tries
	// that Consul turned away with 429 do not count: it looked at none of them,
	// and only asks for time.
	maxTries = 5
	// maxOps is how many keys one transaction reads; Consul takes 128 operations.
	maxOps = 64

	defaultWait = 5 * time.Minute  // as Consul's own
	maxWait     = 10 * time.Minute // as Consul's own
)

// errRolledBack: a transaction's condition did not hold, and nothing changed.
var errRolledBack = errors.New("transaction rolled back")

// retry makes a request that may be repeated without harm: a read, or a write
// that has no further effect the second time. Its errors are ctx's, wrap
// [scheduler.ErrUnavailable], or are errRolledBack or a movedError.
func retry[T any](ctx context.Context, request func(context.Context) (T, error)) (T, error) {
	return retryFor(ctx, requestTimeout, request)
}

func retryFor[T any](ctx context.Context, limit time.Duration, request func(context.Context) (T, error)) (T, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	pause := backoff.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
	for tries := 0; ; {
		value, err := request(limited)
		if err == nil {
			return value, nil
		}
		if !isBusy(err) {
			tries++
		}
		if tries == maxTries || !isBusy(err) && !passing(err) || backoff.Sleep(limited, pause.Next()) != nil {
			return value, classify(ctx, err)
		}
	}
}

// passing says whether a failed request may succeed when it is repeated.
func passing(err error) bool {
	if errors.Is(err, errRolledBack) || isMoved(err) {
		return false
	}
	if status, ok := errors.AsType[api.StatusError](err); ok {
		return status.Code >= 500
	}
	return true
}

// errBusy: Consul turned a request away for want of time, with 429.
var errBusy = errors.New("consul is busy")

func isBusy(err error) bool { return errors.Is(err, errBusy) }

// busyTransport makes an error of the status 429. The client keeps no status of
// a transaction that fails.
type busyTransport struct{ http.RoundTripper }

func (t busyTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := t.RoundTripper.RoundTrip(r)
	if err == nil && response.StatusCode == http.StatusTooManyRequests {
		return nil, errors.Join(errBusy, response.Body.Close())
	}
	return response, err
}

// classify says what a failed request means to the caller: that it gave up
// itself, that a condition did not hold, or that Consul cannot be asked.
func classify(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, errRolledBack) || isMoved(err) || errors.Is(err, scheduler.ErrUnavailable) {
		return err
	}
	return unavailable("", err)
}

// unavailable returns the error that a request failed for want of Consul. It does
// not wrap err: that our own limit passed must not look as if the caller's had.
func unavailable(what string, err error) error {
	return &scheduler.UnavailableError{Reason: what + reason(err), Detail: what + err.Error()}
}

// reason returns why a request failed, in words that may be shown to callers:
// they name no address, key or token.
func reason(err error) string {
	status, answered := errors.AsType[api.StatusError](err)
	errno, refused := errors.AsType[syscall.Errno](err)
	_, noName := errors.AsType[*net.DNSError](err)
	netErr, failed := errors.AsType[net.Error](err)
	text := err.Error()
	switch {
	case isBusy(err):
		return "it has too many requests"
	case answered && status.Code == http.StatusForbidden, strings.Contains(text, "Permission denied"), strings.Contains(text, "ACL not found"):
		return "the Consul token is not permitted to do this"
	case strings.Contains(text, "No cluster leader"):
		return "it has no leader"
	case answered:
		return fmt.Sprintf("it answered with status %d", status.Code)
	case refused:
		return errno.Error()
	case noName:
		return "its name cannot be resolved"
	case errors.Is(err, context.DeadlineExceeded), failed && netErr.Timeout():
		return "no answer in time"
	default:
		return "the request failed"
	}
}

// cleanAddress returns an address of Consul without a slash at its end, which
// would be part of every path. Its errors name no password.
func cleanAddress(address string) (string, error) {
	if address == "" || strings.HasPrefix(address, "unix:///") {
		return address, nil
	}
	scheme, rest, hasScheme := strings.Cut(address, "://")
	if !hasScheme {
		scheme, rest = "http", address
	}
	rest = strings.TrimRight(rest, "/")
	u, err := url.Parse(scheme + "://" + rest)
	switch {
	case err == nil && u.User != nil, strings.Contains(address, "@"):
		return "", errors.New("address: a user and a password must not be part of it; use a token, or CONSUL_HTTP_AUTH")
	case err != nil, u.Host == "", u.RawQuery != "", u.Fragment != "", scheme != "http" && scheme != "https", !isPort(cmp.Or(u.Port(), "80")):
		return "", fmt.Errorf("address %q: need HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix://PATH", address)
	case !hasScheme && u.Path != "":
		return "", fmt.Errorf("address %q: a path needs http:// or https:// before the host", address)
	}
	if hasScheme {
		rest = scheme + "://" + rest
	}
	return rest, nil
}

func isPort(text string) bool {
	_, err := strconv.ParseUint(text, 10, 16)
	return err == nil
}

// park takes one of the places for blocking queries, where block is for one.
func (s *Store) park(block scheduler.Block) (leave func(), err error) {
	if block.Index == 0 {
		return func() {}, nil
	}
	if !s.parked.TryAcquire(1) {
		return nil, fmt.Errorf("%w: %d blocking reads", scheduler.ErrBusy, maxParked)
	}
	return func() { s.parked.Release(1) }, nil
}

// blockingRead makes a consistent read, which waits where block says so. It
// returns the index for the next one.
func blockingRead[T any](
	ctx context.Context, block scheduler.Block, read func(*api.QueryOptions) (T, *api.QueryMeta, error),
) (T, uint64, error) {
	opts := &api.QueryOptions{RequireConsistent: true}
	limit := requestTimeout
	if block.Index != 0 {
		opts.WaitIndex = block.Index
		opts.WaitTime = min(cmp.Or(block.Wait, defaultWait), maxWait)
		limit += opts.WaitTime + opts.WaitTime/16 // Consul adds that much of its own
	}

	var index uint64
	value, err := retryFor(ctx, limit, func(ctx context.Context) (T, error) {
		value, meta, err := read(opts.WithContext(ctx))
		if err != nil {
			return value, err
		}
		if meta.LastIndex == 0 { // as a 404 of something else than Consul has none
			return value, errors.New("the answer is not Consul's: it has no index")
		}
		if meta.ResultsFilteredByACLs {
			return value, errors.New("the Consul token may not read all keys")
		}
		index = meta.LastIndex
		return value, nil
	})
	return value, index, err
}

// get reads one key, nil where there is none.
func (s *Store) get(ctx context.Context, key string, block scheduler.Block) (*api.KVPair, uint64, error) {
	return blockingRead(ctx, block, func(opts *api.QueryOptions) (*api.KVPair, *api.QueryMeta, error) {
		return s.client.KV().Get(key, opts)
	})
}

// list reads the keys below prefix, in order, up to the next separator if any.
func (s *Store) list(ctx context.Context, prefix, separator string, block scheduler.Block) ([]string, uint64, error) {
	return blockingRead(ctx, block, func(opts *api.QueryOptions) ([]string, *api.QueryMeta, error) {
		return s.client.KV().Keys(prefix, separator, opts)
	})
}

// txn makes one try at a transaction. An error other than errRolledBack and a
// movedError leaves open whether it was applied.
func (s *Store) txn(ctx context.Context, ops ...*api.KVTxnOp) ([]*api.KVPair, error) {
	all := make(api.TxnOps, len(ops))
	for i, op := range ops {
		all[i] = &api.TxnOp{KV: op}
	}
	ok, response, _, err := s.client.Txn().Txn(all, (&api.QueryOptions{RequireConsistent: true}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	if !ok {
		var reasons []string
		for _, e := range response.Errors {
			if strings.Contains(e.What, "Permission denied") { // comes as if a condition did not hold
				return nil, unavailable("", errors.New(e.What)) // the others say the same of other keys
			}
			reasons = append(reasons, e.What)
		}
		for _, e := range response.Errors {
			if op := ops[e.OpIndex]; op.Verb == api.KVCheckIndex && op.Key == s.keys.identity() {
				return nil, &movedError{op.Index}
			}
		}
		return nil, fmt.Errorf("%w: %s", errRolledBack, strings.Join(reasons, "; "))
	}
	pairs := make([]*api.KVPair, 0, len(response.Results))
	for _, result := range response.Results {
		if result.KV != nil {
			pairs = append(pairs, result.KV)
		}
	}
	return pairs, nil
}

func isMoved(err error) bool {
	_, moved := errors.AsType[*movedError](err)
	return moved
}

// retryTxn makes a transaction that may be repeated without harm.
func (s *Store) retryTxn(ctx context.Context, ops ...*api.KVTxnOp) ([]*api.KVPair, error) {
	return retry(ctx, func(ctx context.Context) ([]*api.KVPair, error) { return s.txn(ctx, ops...) })
}

// pick returns what a transaction read at key. A key that does not exist comes
// with ModifyIndex 0. One that does not come at all was withheld by an ACL: to
// take that for a missing key would be to take doubt for an answer.
func pick(pairs []*api.KVPair, key string) (*api.KVPair, error) {
	for _, pair := range pairs {
		if pair.Key == key {
			return pair, nil
		}
	}
	return nil, fmt.Errorf("%w: the answer lacks %s; may the Consul token read it?", scheduler.ErrUnavailable, key)
}
