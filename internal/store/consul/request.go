package consul

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/scheduler"
)

const (
	// requestTimeout bounds all tries of one request together.
	requestTimeout = 5 * time.Second
	// maxTries bounds the tries of a request that may be repeated. Tries that Consul
	// answers with status 429 do not count, because it has not processed them.
	maxTries = 5
	// maxOps is how many keys one transaction reads. Consul accepts 128 operations.
	maxOps = 64

	defaultWait = 5 * time.Minute  // same as Consul's
	maxWait     = 10 * time.Minute // same as Consul's
)

// errRolledBack is returned when a transaction's condition did not hold. It changed
// nothing.
var errRolledBack = errors.New("transaction rolled back")

// newBackOff returns the pauses between tries. They have jitter, so that replicas that
// were refused together do not try again together.
func newBackOff(first, longest time.Duration) *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval, b.Multiplier = jitter(first), jitter(longest), 2
	b.RandomizationFactor = 0 // a simulation could not control its random source
	b.Reset()
	return b
}

// jitter returns a random time between half of d and d.
func jitter(d time.Duration) time.Duration {
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails
	return d/2 + d/2*time.Duration(binary.BigEndian.Uint16(b[:]))>>16
}

// retry makes a request, repeatedly if it fails. The request must be a read, or a write
// that has no further effect the second time. The error is ctx's, wraps
// [scheduler.ErrUnavailable], or is errRolledBack or a movedError.
func retry[T any](ctx context.Context, request func(context.Context) (T, error)) (T, error) {
	return retryFor(ctx, requestTimeout, request)
}

func retryFor[T any](ctx context.Context, limit time.Duration, request func(context.Context) (T, error)) (T, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tries := 0
	value, err := backoff.Retry(limited, func() (T, error) {
		value, err := request(limited)
		if err == nil || isBusy(err) {
			return value, err
		}
		if tries++; tries == maxTries || !passing(err) {
			err = backoff.Permanent(err)
		}
		return value, err
	}, backoff.WithBackOff(newBackOff(50*time.Millisecond, time.Second)), backoff.WithMaxElapsedTime(limit))
	if err != nil {
		return value, classify(ctx, err)
	}
	return value, nil
}

// passing reports whether a failed request may succeed if it is repeated.
func passing(err error) bool {
	if errors.Is(err, errRolledBack) || isMoved(err) {
		return false
	}
	if status, ok := errors.AsType[api.StatusError](err); ok {
		return status.Code >= 500
	}
	return true
}

// errBusy is returned when Consul answers with status 429 because it has too much to do.
var errBusy = errors.New("consul is busy")

func isBusy(err error) bool { return errors.Is(err, errBusy) }

// busyTransport turns the status 429 into errBusy. The client does not return the
// status of a failed transaction.
type busyTransport struct{ http.RoundTripper }

func (t busyTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := t.RoundTripper.RoundTrip(r)
	if err == nil && response.StatusCode == http.StatusTooManyRequests {
		return nil, errors.Join(errBusy, response.Body.Close())
	}
	return response, err
}

// classify returns what a failed request means to the caller: that ctx ended, that a
// condition did not hold, or that Consul is unavailable.
func classify(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, errRolledBack) || isMoved(err) || errors.Is(err, scheduler.ErrUnavailable) {
		return err
	}
	return unavailable("", err)
}

// unavailable returns the error that Consul is unavailable. It does not wrap err, so
// that our own timeout does not look like the caller's.
func unavailable(what string, err error) error {
	return &scheduler.UnavailableError{Reason: what + reason(err), Detail: what + err.Error()}
}

// reason returns why a request failed. Callers may see the text, so it contains no
// address, key or token.
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

// cleanAddress returns Consul's address without a slash at its end, which would be part
// of every path. Its errors contain no password.
func cleanAddress(address string) (string, error) {
	if address == "" || strings.HasPrefix(address, "unix://") {
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
		return "", errors.New("address: it must not contain a user and a password; use a token, or CONSUL_HTTP_AUTH")
	case err != nil, u.Host == "", u.RawQuery != "", u.Fragment != "", scheme != "http" && scheme != "https":
		return "", fmt.Errorf("address %q is invalid: use HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix://PATH", address)
	case !hasScheme && u.Path != "":
		return "", fmt.Errorf("address %q is invalid: a path requires http:// or https:// before the host", address)
	}
	if hasScheme {
		rest = scheme + "://" + rest
	}
	return rest, nil
}

// park takes one of the places for blocking reads, if block makes a read block. leave
// gives it back.
func (s *Store) park(block scheduler.Block) (leave func(), err error) {
	if block.Index == 0 {
		return func() {}, nil
	}
	if !s.parked.TryAcquire(1) {
		return nil, fmt.Errorf("%w: already %d blocking reads", scheduler.ErrBusy, maxParked)
	}
	return func() { s.parked.Release(1) }, nil
}

// blockingRead makes a consistent read, which waits if block says so. It returns the
// index for the next read.
func blockingRead[T any](
	ctx context.Context, block scheduler.Block, read func(*api.QueryOptions) (T, *api.QueryMeta, error),
) (T, uint64, error) {
	opts := &api.QueryOptions{RequireConsistent: true}
	limit := requestTimeout
	if block.Index != 0 {
		opts.WaitIndex = block.Index
		opts.WaitTime = min(cmp.Or(block.Wait, defaultWait), maxWait)
		limit += opts.WaitTime + opts.WaitTime/16 // Consul adds up to 1/16 itself
	}

	var index uint64
	value, err := retryFor(ctx, limit, func(ctx context.Context) (T, error) {
		value, meta, err := read(opts.WithContext(ctx))
		if err != nil {
			return value, err
		}
		if meta.LastIndex == 0 { // such as a 404 of another server
			return value, errors.New("the answer does not come from Consul: it has no index")
		}
		if meta.ResultsFilteredByACLs {
			return value, errors.New("the Consul token may not read all keys")
		}
		index = meta.LastIndex
		return value, nil
	})
	return value, index, err
}

// get reads one key. It returns nil if there is none.
func (s *Store) get(ctx context.Context, key string, block scheduler.Block) (*api.KVPair, uint64, error) {
	return blockingRead(ctx, block, func(opts *api.QueryOptions) (*api.KVPair, *api.QueryMeta, error) {
		return s.client.KV().Get(key, opts)
	})
}

// list returns the keys below prefix in order, cut after the next separator if there is
// one.
func (s *Store) list(ctx context.Context, prefix, separator string, block scheduler.Block) ([]string, uint64, error) {
	return blockingRead(ctx, block, func(opts *api.QueryOptions) ([]string, *api.QueryMeta, error) {
		return s.client.KV().Keys(prefix, separator, opts)
	})
}

// txn tries a transaction once. After an error other than errRolledBack and a movedError
// it is not known whether the transaction was applied.
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
			if strings.Contains(e.What, "Permission denied") { // looks like a failed condition
				return nil, unavailable("", errors.New(e.What)) // the other errors are the same for other keys
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

// retryTxn makes a transaction that may be repeated; see retry.
func (s *Store) retryTxn(ctx context.Context, ops ...*api.KVTxnOp) ([]*api.KVPair, error) {
	return retry(ctx, func(ctx context.Context) ([]*api.KVPair, error) { return s.txn(ctx, ops...) })
}

// pick returns what a transaction read at key. A key that does not exist has
// ModifyIndex 0. If the answer does not contain the key at all, an ACL withheld it. That
// is an error, because the key may exist.
func pick(pairs []*api.KVPair, key string) (*api.KVPair, error) {
	for _, pair := range pairs {
		if pair.Key == key {
			return pair, nil
		}
	}
	return nil, fmt.Errorf("%w: the answer does not contain %s; check that the Consul token may read it", scheduler.ErrUnavailable, key)
}
