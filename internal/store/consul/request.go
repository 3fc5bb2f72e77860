package consul

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/credentials"
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

// retry makes a request, repeatedly if it fails. The request must be a read, or a write
// that has no further effect the second time. The error is ctx's, wraps
// [scheduler.ErrUnavailable] or [scheduler.ErrSpareTaken], or is errRolledBack or a
// movedError.
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

// passing reports whether a failed request may succeed if it is repeated.
func passing(err error) bool {
	if isRefused(err) || isMoved(err) {
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

// Observer is called after each request with what it was for, how long it took until
// its answer began, and its status, which is 0 if there was no answer.
type Observer = func(operation string, took time.Duration, status int, err error)

// errTokenReplaced is returned when Consul refuses a token, and there is another one by
// now.
var errTokenReplaced = errors.New("consul refused a token that has been replaced since")

// transport sends the token with each request, and calls its observers after each. It
// turns the status 429 into errBusy, and the status of a refused token into
// errTokenReplaced if it makes sense to try again. The client does not return the status
// of a failed transaction.
//
// It does not try again itself, because only the caller knows what a request that may
// have been applied means.
type transport struct {
	http.RoundTripper
	token     *credentials.Token // nil: the request has its token already
	observers []Observer
}

// RoundTrip implements [http.RoundTripper].
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.token == nil {
		return t.observe(r)
	}
	token := t.token.Value()
	r = r.Clone(r.Context())
	r.Header.Set("X-Consul-Token", token)
	response, err := t.observe(r)
	if err == nil && isRefusal(response.StatusCode) {
		if _, replaced := t.token.Newer(token); replaced {
			return nil, errors.Join(errTokenReplaced, response.Body.Close())
		}
	}
	return response, err
}

func isRefusal(status int) bool {
	return status == http.StatusUnauthorized || status == http.StatusForbidden
}

func (t *transport) observe(r *http.Request) (*http.Response, error) {
	began := time.Now()
	response, err := t.RoundTripper.RoundTrip(r)
	took, status := time.Since(began), 0
	if err == nil {
		status = response.StatusCode
	}
	for _, observe := range t.observers {
		observe(operationOf(r), took, status, err)
	}
	if err == nil && response.StatusCode == http.StatusTooManyRequests {
		return nil, errors.Join(errBusy, response.Body.Close())
	}
	return response, err
}

// operationOf returns what a request is for, in one of a few words.
func operationOf(r *http.Request) string {
	_, path, _ := strings.Cut(r.URL.Path, "/v1/")
	kind, _, _ := strings.Cut(path, "/")
	switch {
	case kind == "txn", kind == "session":
		return kind
	case kind != "kv":
		return "other"
	case r.Method != http.MethodGet:
		return "write"
	case strings.Contains(r.URL.RawQuery, "index="):
		return "blocking_read"
	}
	return "read"
}

// classify returns what a failed request means to the caller: that ctx ended, that a
// condition did not hold, or that Consul is unavailable.
func classify(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if isRefused(err) || isMoved(err) || errors.Is(err, scheduler.ErrUnavailable) {
		return err
	}
	return unavailable("", err)
}

// unavailable returns the error that Consul is unavailable, or that it refuses this
// server's credentials, which is both. It does not wrap err, so that our own timeout does
// not look like the caller's.
func unavailable(what string, err error) error {
	why := &scheduler.UnavailableError{Reason: what + reason(err), Detail: what + err.Error()}
	if isDenied(err) {
		return fmt.Errorf("%w: %w", scheduler.ErrServerDenied, why)
	}
	return why
}

// errFiltered is returned if an ACL withheld a part of an answer.
var errFiltered = errors.New("the Consul token may not read all keys")

// isDenied reports whether Consul refused the token or the client certificate.
func isDenied(err error) bool {
	if status, ok := errors.AsType[api.StatusError](err); ok && isRefusal(status.Code) {
		return true
	}
	text := err.Error()
	return errors.Is(err, errFiltered) || isRefusedCertificate(err) ||
		strings.Contains(text, "Permission denied") || strings.Contains(text, "ACL not found")
}

// isRefusedCertificate reports whether Consul refused the client certificate, or its
// absence. The names of these TLS alerts are the only sign.
func isRefusedCertificate(err error) bool {
	alert, ok := errors.AsType[*net.OpError](err)
	return ok && alert.Op == "remote error" &&
		(strings.Contains(alert.Error(), "certificate") || strings.Contains(alert.Error(), "access denied"))
}

// lackedPermission matches Consul's words for a permission such as key:write.
var lackedPermission = regexp.MustCompile(`lacks permission '([a-z:]+)'`)

// reason returns why a request failed. Callers may see the text, so it contains no
// address, key or token.
func reason(err error) string {
	status, answered := errors.AsType[api.StatusError](err)
	errno, refused := errors.AsType[syscall.Errno](err)
	_, noName := errors.AsType[*net.DNSError](err)
	netErr, failed := errors.AsType[net.Error](err)
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	switch {
	case isBusy(err):
		return "it has too many requests"
	case isRefusedCertificate(err):
		return "it refuses this server's TLS certificate"
	case untrusted:
		return "its TLS certificate cannot be verified"
	case isDenied(err):
		if lacks := lackedPermission.FindStringSubmatch(err.Error()); lacks != nil {
			return "the Consul token lacks the permission " + lacks[1]
		}
		return "the Consul token is not permitted to do this"
	case strings.Contains(err.Error(), "No cluster leader"):
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
		return "", errors.New("address: it must not contain a user and a password; use a token, or CONSUL_HTTP_AUTH")
	case err != nil, u.Host == "", u.RawQuery != "", u.Fragment != "", scheme != "http" && scheme != "https", !isPort(cmp.Or(u.Port(), "80")):
		return "", fmt.Errorf("address %q is invalid: use HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix://PATH", address)
	case !hasScheme && u.Path != "":
		return "", fmt.Errorf("address %q is invalid: a path requires http:// or https:// before the host", address)
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

// park takes one of the places for blocking reads, if block makes a read block. leave
// gives it back.
func (s *Store) park(block scheduler.Block) (leave func(), err error) {
	if block.Index == 0 {
		return func() {}, nil
	}
	return s.parked.Enter()
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
			return value, errFiltered
		}
		index = meta.LastIndex
		return value, nil
	})
	return value, index, err
}

// get reads one key. It returns nil if there is none.
func get(ctx context.Context, client *api.Client, key string, block scheduler.Block) (*api.KVPair, uint64, error) {
	return blockingRead(ctx, block, func(opts *api.QueryOptions) (*api.KVPair, *api.QueryMeta, error) {
		return client.KV().Get(key, opts)
	})
}

func (s *Store) get(ctx context.Context, key string, block scheduler.Block) (*api.KVPair, uint64, error) {
	return get(ctx, s.client, key, block)
}

// list returns the keys below prefix in order, cut after the next separator if there is
// one.
func (s *Store) list(ctx context.Context, prefix, separator string, block scheduler.Block) ([]string, uint64, error) {
	return blockingRead(ctx, block, func(opts *api.QueryOptions) ([]string, *api.QueryMeta, error) {
		return s.client.KV().Keys(prefix, separator, opts)
	})
}

// txn tries a transaction once. It returns ErrSpareTaken if only the record of a spare is
// not as expected. After an error other than that, errRolledBack and a movedError it is not known whether the transaction was applied.
func (s *Store) txn(ctx context.Context, ops ...*api.KVTxnOp) ([]*api.KVPair, error) {
	all := make(api.TxnOps, len(ops))
	for i, op := range ops {
		op.Namespace, op.Partition = s.namespace, s.partition
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
		for _, key := range []string{s.keys.identity(), s.keys.eventsHead()} {
			for _, e := range response.Errors {
				if op := ops[e.OpIndex]; op.Verb == api.KVCheckIndex && op.Key == key {
					return nil, &movedError{key, op.Index}
				}
			}
		}
		refused := errRolledBack
		if !slices.ContainsFunc(response.Errors, func(e *api.TxnError) bool { return !strings.HasPrefix(ops[e.OpIndex].Key, s.keys.spares()) }) {
			refused = scheduler.ErrSpareTaken
		}
		return nil, fmt.Errorf("%w: %s", refused, strings.Join(reasons, "; "))
	}
	pairs := make([]*api.KVPair, 0, len(response.Results))
	for _, result := range response.Results {
		if result.KV != nil {
			pairs = append(pairs, result.KV)
		}
	}
	return pairs, nil
}

// movedError is returned by a transaction that checks the identity or the head of the
// changes if that key does not have the expected index. The transaction changed nothing.
type movedError struct {
	key   string
	index uint64
}

func (e *movedError) Error() string { return fmt.Sprintf("%s is not at index %d", e.key, e.index) }

// maxMoves bounds the tries of a transaction whose checks fail with a movedError.
const maxMoves = 16

// follow returns nil once it is known what moved to, so that it makes sense to try again.
func (s *Store) follow(ctx context.Context, moved *movedError) error {
	if moved.key == s.keys.identity() {
		return s.identity.moved(ctx, moved.index)
	}
	return s.changes.moved(ctx, moved.index)
}

// followTxn makes a transaction that may be repeated, and makes it again if what it checks
// has moved. ops returns the operations for each try.
func (s *Store) followTxn(ctx context.Context, ops func() []*api.KVTxnOp) ([]*api.KVPair, error) {
	for moves := 0; ; moves++ {
		pairs, err := s.retryTxn(ctx, ops()...)
		moved, ok := errors.AsType[*movedError](err)
		switch {
		case !ok:
			return pairs, err
		case moves == maxMoves:
			return nil, unavailable("", err)
		}
		if err := s.follow(ctx, moved); err != nil {
			return nil, err
		}
	}
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
	return nil, unavailable("", fmt.Errorf("%w: the answer does not contain %s", errFiltered, key)) // safeguard: doubt about what a token may not read
}
