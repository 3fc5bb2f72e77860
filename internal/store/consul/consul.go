// Package consul keeps records and locks in Consul's KV store.
//
// Two transactions do the work. The first takes the chat's lock key with this
// replica's Consul session and reads the record. The second checks that the lock key
// is unchanged, compares and sets the record, writes the index entries, and may
// delete the lock key. Once another lease has taken the lock, that check fails, so a
// holder that slept through the end of its Consul session changes nothing. Only
// Consul decides who holds a lock. The local clock is used to stop early, never to
// continue.
//
// One clock decides whether a session has expired, even if the clocks of the
// replicas' machines are up to 5 minutes apart: one replica writes its time to a key
// every second, and the others measure their offset from it; see [Clock]. Consul and
// Nomad do not return their time, so it cannot be used. No decision about who may act
// depends on a clock.
//
// What happens to sessions is stored in the transaction of the record, too. All replicas
// read it in the same order; see changeLog.
//
// The package does not know what a record is for, or what a sandbox is.
package consul

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/store/chatmutex"
	"github.com/bivouac/bivouac/scheduler"
)

// DefaultPrefix is the default KV prefix of all keys.
const DefaultPrefix = "bivouac/"

const (
	// maxConns bounds the connections of a client from [NewClient]. By default
	// Consul accepts 200 from one address.
	maxConns = 160
	// maxParked bounds how many of them may wait in blocking reads, and maxAwaited
	// how many may wait for locks of other replicas. The rest stay free for requests
	// that are answered at once.
	maxParked  = 80
	maxAwaited = 40
)

// Config is the configuration of a [Store].
type Config struct {
	Prefix   string // KV prefix of all keys; empty means DefaultPrefix
	Instance string // the configured name of this Bivouac instance; see [Identity]
	Name     string // name of the replica's machine, shown on its Consul session
	Version  string // of the replica
	// Addresses are those that the replica's API listens on.
	Addresses []string
	Logger    hclog.Logger
	// Retention is how long changes are kept. Empty fields mean the default.
	Retention scheduler.Retention

	// Namespace and Partition are those of the client. Consul Enterprise wants them in
	// each operation of a transaction too. Empty means those of the token.
	Namespace, Partition string

	// Clock must know the time before Lock, LockDamaged and Get return a session, so
	// that none ends or is used because of a wrong clock. Lists do not wait for it: a
	// caller takes a lock before it acts on one. If Clock is nil, nothing waits.
	Clock *Clock
	// Place returns where in Nomad the sandboxes run. It is nil if Nomad is not used.
	Place func(ctx context.Context) (Place, error)
	// Running counts the running sandboxes by the instance ID in them. It is called
	// only while the store has no identity. It is nil if nobody can count them.
	Running func(ctx context.Context) (map[string]int, error)
}

// Store is a [scheduler.Store] and a [scheduler.Locker]. It works while Run runs and
// the store's [Identity] is known. Its methods wait a few seconds for that, and then
// return [scheduler.ErrUnavailable].
type Store struct {
	client   *api.Client
	log      hclog.Logger
	keys     keyspace
	parked   scheduler.Places
	awaited  *semaphore.Weighted
	chats    chatmutex.Mutex // because one Consul session can take a lock twice
	identity *identity
	clock    *Clock // nil: nobody waits for the time
	session  *sessionKeeper
	changes  *changeLog
	buckets  buckets
	agents   agentNames
	access   access

	namespace, partition string // of the keys in transactions
}

// New returns a store that uses client, which should come from [NewClient]. It
// returns an error if the prefix is invalid.
func New(client *api.Client, config Config) (*Store, error) {
	keys, err := newKeyspace(config.Prefix)
	if err != nil {
		return nil, err
	}
	s := &Store{
		client:  client,
		log:     config.Logger,
		keys:    keys,
		parked:  scheduler.NewPlaces(maxParked, "waiting", "already %d blocking reads"),
		awaited: semaphore.NewWeighted(maxAwaited),
		clock:   config.Clock,
		access:  newAccess(),

		namespace: config.Namespace, partition: config.Partition,
	}
	s.identity = newIdentity(s, config)
	s.session = newKeeper(s, Replica{config.Name, config.Version, config.Addresses, time.Now().Round(0).UTC()})
	s.changes = newChangeLog(s, config.Retention)
	return s, nil
}

// NewClient returns a client with a bounded number of connections. It sends the token
// with each request, or config's token if token is nil. If Consul refuses the token, the
// client reads the token again. Its requests fail with special errors if there is
// another one then, and if Consul is busy. It calls the observers after each request.
//
// NewClient returns an error if config's address is invalid. It changes config's address,
// transport and HTTP client.
func NewClient(config *api.Config, token *credentials.Token, observers ...Observer) (*api.Client, error) {
	address, err := cleanAddress(config.Address)
	if err != nil {
		return nil, err
	}
	if config.Transport == nil {
		config.Transport = api.DefaultConfig().Transport
	}
	config.Transport.MaxConnsPerHost = maxConns
	config.Transport.MaxIdleConnsPerHost = maxConns
	config.Transport.MaxIdleConns = maxConns
	// Use HTTP/1.1 only. Consul offers HTTP/2 on its HTTPS port. There one connection
	// carries all requests, and one that died silently is used for some 250 more
	// requests, which all time out.
	config.Transport.ForceAttemptHTTP2 = false
	config.Address = address
	socket, isSocket := strings.CutPrefix(address, "unix://")
	if isSocket { // api.NewClient would use a transport without these bounds
		config.Address = "localhost"
		config.Transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}
	}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("consul: %w", err)
	}
	if isSocket {
		config.Address = socket
	}
	config.HttpClient.Transport = &transport{config.HttpClient.Transport, token, observers}
	return client, nil
}

// Run reads the identity of the store, or writes one, and follows it. It also keeps
// this replica's Consul session, which every lock needs, and drops old changes. When ctx ends, Run waits a
// few seconds until all locks are released, destroys the session and returns nil. It
// returns an error if the records belong to another Bivouac instance.
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
	g.Go(func() error {
		if _, err := s.Identity(ctx); err == nil {
			s.changes.run(ctx)
		}
		return nil
	})
	return g.Wait()
}

// awaitTime returns nil once the time is known, if the store has a clock. It waits for
// that within a limit.
func (s *Store) awaitTime(ctx context.Context) error {
	if s.clock == nil || s.clock.isKnown() {
		return nil
	}
	if err := s.identity.stands(ctx); err != nil { // without it nobody writes the time
		return err
	}
	return s.clock.await(ctx)
}

// Health returns nil if Consul has a leader, the Consul token may read, write and
// list keys below the prefix, the store has its identity, this replica has a Consul
// session or has not tried to create one yet, and the time is known.
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
	case keysErr == nil && otherErr == nil && s.clock != nil:
		otherErr = s.clock.checkKnown()
	}
	if err := cmp.Or(keysErr, otherErr); err != nil {
		return fmt.Errorf("consul: health: %w", err)
	}
	return nil
}
