// Package consul keeps records and locks in Consul's KV store.
//
// Two transactions carry the weight. One takes the chat's lock key with this
// replica's Consul session and reads the record. The other checks that the lock
// key is as this lease made it, compares and sets the record, writes the index
// entries, and may delete the lock key. The check fails once another took the
// lock, so that a holder who slept through the end of its session changes
// nothing. What is held in Consul is only ever decided by Consul: the local
// clock is used to stop early, never to go on.
//
// Whether a session has expired is judged by one clock, whatever the clocks of
// the replicas' machines say, up to 5 minutes apart: one replica writes its time
// to a key every second, and the others measure their offset from it as they
// see it come; see [Clock]. Consul and Nomad do not tell the time in what they
// answer, so there is nothing of theirs to measure against. No decision about
// who may act depends on any clock.
//
// The package must never know what a record is for, or what a sandbox is.
package consul

import (
	"cmp"
	"context"
	"fmt"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/bivouac/bivouac/internal/store/chatmutex"
	"github.com/bivouac/bivouac/scheduler"
)

// DefaultPrefix is below what keys records and locks stand.
const DefaultPrefix = "bivouac/"

const (
	// maxConns bounds the connections of a client from [NewClient]. Consul
	// takes 200 from one address unless it is told otherwise.
	maxConns = 160
	// maxParked bounds how many of them may wait in blocking reads at a time,
	// and maxAwaited how many for locks that other replicas hold, so that others
	// are left for requests that are answered at once.
	maxParked  = 80
	maxAwaited = 40
)

// Config says how to use Consul.
type Config struct {
	Prefix   string // of all keys; empty means DefaultPrefix
	Instance string // the configured name of this Bivouac; see [Identity]
	Name     string // of the replica's machine, as operators see it on its Consul session
	Logger   hclog.Logger

	// Place says where in Nomad the sandboxes run. Nil if Nomad is not used.
	Place func(ctx context.Context) (Place, error)
	// Running counts what runs, by the instance ID that it bears. It is asked
	// only while no identity stands. Nil if nobody can tell.
	Running func(ctx context.Context) (map[string]int, error)
}

// Store is a [scheduler.Store] and a [scheduler.Locker], while Run runs and the
// identity of the store is known: see [Identity]. Its methods wait for that some
// seconds, and then return [scheduler.ErrUnavailable].
type Store struct {
	client   *api.Client
	log      hclog.Logger
	keys     keyspace
	parked   *semaphore.Weighted
	awaited  *semaphore.Weighted
	chats    chatmutex.Mutex // one session may take a lock twice, one chat's mutex may not
	identity *identity
	session  *keeper
	buckets  buckets
	access   access
}

// New returns a store that uses client, which should come from [NewClient]. It
// fails if the prefix is not plain.
func New(client *api.Client, config Config) (*Store, error) {
	keys, err := newKeyspace(cmp.Or(config.Prefix, DefaultPrefix))
	if err != nil {
		return nil, err
	}
	s := &Store{
		client:  client,
		log:     config.Logger,
		keys:    keys,
		parked:  semaphore.NewWeighted(maxParked),
		awaited: semaphore.NewWeighted(maxAwaited),
		access:  newAccess(),
	}
	s.identity = newIdentity(s, config)
	s.session = newKeeper(s, config.Name)
	return s, nil
}

// NewClient returns a client with a bounded number of connections, whose
// requests fail with an error of their own where Consul is busy. It fails if
// config's address is none that Consul can have. It sets the address, the bounds
// in config's transport, and its HTTP client.
func NewClient(config *api.Config) (*api.Client, error) {
	var err error
	if config.Address, err = cleanAddress(config.Address); err != nil {
		return nil, err
	}
	if config.Transport == nil {
		config.Transport = api.DefaultConfig().Transport
	}
	config.Transport.MaxConnsPerHost = maxConns
	config.Transport.MaxIdleConnsPerHost = maxConns
	config.Transport.MaxIdleConns = maxConns
	// HTTP/1.1 only. Over HTTP/2, which Consul offers on its HTTPS port, one
	// connection carries all requests, and one that died silently is used for
	// some 250 more of them, each of which times out.
	config.Transport.ForceAttemptHTTP2 = false
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("consul: %w", err)
	}
	config.HttpClient.Transport = busyTransport{config.HttpClient.Transport}
	return client, nil
}

// Run finds out the identity of the store, or gives it one, and follows it. From
// then on it keeps this replica's Consul session, without which no lock is given
// out. When ctx ends it waits a few seconds for the locks that are held to be
// given up, and destroys the session. It returns nil then, and an error if the
// records are another Bivouac's.
func (s *Store) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.identity.run(ctx) })
	g.Go(func() error { s.watchAccess(ctx); return nil })
	g.Go(func() error {
		if own, err := s.Identity(ctx); err == nil { // else ctx has ended
			s.session.run(ctx, own.Instance)
		}
		return nil
	})
	return g.Wait()
}

// Health returns nil if Consul has a leader, the Consul token may read, write and
// list keys below the prefix, the store has its identity, and this replica has a
// Consul session or did not try yet to make one.
func (s *Store) Health(ctx context.Context) error {
	leader, err := retry(ctx, func(ctx context.Context) (string, error) {
		return s.client.Status().LeaderWithQueryOptions((&api.QueryOptions{}).WithContext(ctx))
	})
	if err != nil {
		return fmt.Errorf("consul: health: %w", err)
	}
	if leader == "" {
		return fmt.Errorf("consul: health: %w: no leader", scheduler.ErrUnavailable)
	}
	keysErr, otherErr := s.checkAccess(ctx), cmp.Or(s.identity.trouble(), s.session.trouble())
	switch {
	case keysErr != nil && otherErr != nil:
		return fmt.Errorf("consul: health: %w; %w", keysErr, otherErr)
	case keysErr != nil || otherErr != nil:
		return fmt.Errorf("consul: health: %w", cmp.Or(keysErr, otherErr))
	default:
		return nil
	}
}
