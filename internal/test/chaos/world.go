package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/test/stack"
)

const (
	replicas = 3
	prefix   = "chaos/"
	instance = "chaos"

	// The neighbour is another Bivouac of the same name on the same servers.
	neighbourPrefix = "neighbour/"
	neighbourChats  = 3

	// manyConns is more than the default limits of Consul and Nomad, because
	// all replicas connect from one address.
	manyConns = 2000

	// A node counts as lost 10 to 15 s after its last heartbeat.
	heartbeat      = 5 * time.Second
	heartbeatGrace = 5 * time.Second
)

// world is everything that runs.
type world struct {
	plan     plan
	dir      string
	log      *timeline
	consul   *stack.Consul
	nomad    *stack.Nomad
	kv       *consulapi.Client // bypasses the proxies
	jobs     *nomadapi.Client  // bypasses the proxies
	replicas []*replica
	chats    []uuid.UUID

	pools       *pools // nil: there are none
	nodeHelpers *stack.Helpers
	lostWarm    lostWarm

	neighbour *replica
	theirs    []uuid.UUID // the neighbour's chats

	told     *ledger
	census   *census
	load     *load
	readers  []*reader // of the replicas' events
	settled  []time.Duration
	cleaned  []time.Duration // until no spare was left over
	filled   []time.Duration // until the pool was full again
	served   atomic.Int64    // creates while nothing was broken
	checked  int             // events that were compared last
	reported map[string]bool // what was wrong with events, and was told

	random   *rand.Rand
	randomMu sync.Mutex
	out      chan struct{} // one token per replica that is down
	counting sync.WaitGroup
	stopped  context.CancelFunc
}

func newWorld(ctx context.Context, dir string, log *timeline, p plan) (*world, error) {
	w := &world{
		plan: p, dir: dir, log: log, told: newLedger(log),
		random:   rand.New(rand.NewPCG(p.seed, 0)),
		out:      make(chan struct{}, replicas-1),
		stopped:  func() {},
		reported: make(map[string]bool),
	}
	for range p.chats {
		w.chats = append(w.chats, uuid.New())
	}
	for range neighbourChats {
		w.theirs = append(w.theirs, uuid.New())
	}
	w.census = newCensus(slices.Concat(w.chats, w.theirs), log, w.told)
	w.load = &load{chats: w.chats, volume: filepath.Join(dir, "volume"), told: w.told, log: log}
	err := os.Mkdir(w.load.volume, 0o755)
	if err == nil {
		err = w.start(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, w.stop(true))
	}
	w.load.replicas = w.replicas
	return w, nil
}

// start starts the servers and the replicas.
func (w *world) start(ctx context.Context) error {
	binary := cmp.Or(w.plan.binary, filepath.Join(w.dir, "bivouac"))
	all, startCtx := errgroup.WithContext(ctx)
	all.Go(func() (err error) {
		w.consul, err = stack.StartConsul(startCtx, stack.ConsulConfig{Servers: 3, MaxHTTPConns: manyConns})
		return err
	})
	all.Go(func() (err error) {
		w.nomad, err = stack.StartNomad(startCtx, stack.NomadConfig{
			Servers: 1, Clients: 2, Drivers: []string{"raw_exec"},
			MaxHTTPConns: manyConns, HeartbeatGrace: heartbeatGrace, MinHeartbeatTTL: heartbeat,
		})
		return err
	})
	if w.plan.binary == "" {
		all.Go(func() error { return stack.BuildBivouac(startCtx, binary, "failpoints") })
	}
	if err := all.Wait(); err != nil {
		return err
	}
	var servers []string
	for _, s := range w.consul.Servers {
		servers = append(servers, s.Addr)
	}
	var err error
	if w.jobs, err = w.nomad.Client(); err != nil {
		return err
	}
	if err := w.startHelpers(ctx, binary); err != nil {
		return err
	}
	// The neighbour comes first: while sandboxes of another Bivouac run under its name, it
	// asks whose they are before it begins.
	if w.neighbour, err = w.newReplica("neighbour", binary, servers, append(flags("5s"), "-kv-prefix="+neighbourPrefix)); err != nil {
		return err
	}
	if err := w.neighbour.start(ctx); err != nil {
		return err
	}
	for i := range replicas {
		// Each prefers another server, as Consul agents are spread over the
		// servers.
		near := append(append([]string(nil), servers[i:]...), servers[:i]...)
		name, flags := fmt.Sprintf("replica-%d", i), flags("5s")
		file := filepath.Join(w.dir, name+"-pool.hcl")
		if w.pools != nil {
			flags = append(flags, "-config="+file)
		}
		r, err := w.newReplica(name, binary, near, flags)
		if err != nil {
			return err
		}
		r.pools, r.file = w.pools, file
		w.replicas = append(w.replicas, r)
		if err := r.start(ctx); err != nil {
			return err
		}
	}
	direct, err := newProxy(servers, w.draw())
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, direct.stop)
	w.kv, err = consulapi.NewClient(&consulapi.Config{Address: direct.Addr()})
	return err
}

// startHelpers runs a node helper on each client, and decides that there is a pool.
func (w *world) startHelpers(ctx context.Context, binary string) (err error) {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "chaos: there are no pools, because a node helper needs root")
		return nil
	}
	if w.nodeHelpers, err = stack.StartHelpers(ctx, w.nomad, binary, w.dir); err != nil {
		return err
	}
	w.pools = newPools(w.nodeHelpers.Config)
	w.census.nomad = filepath.Dir(w.nomad.VolumeDir)
	return nil
}

// newReplica creates a replica that reaches the servers through its own
// proxies.
func (w *world) newReplica(name, binary string, consulServers, flags []string) (*replica, error) {
	consul, err := newProxy(consulServers, w.draw())
	if err != nil {
		return nil, err
	}
	nomad, err := newProxy([]string{w.nomad.Addr()}, w.draw())
	if err != nil {
		return nil, err
	}
	return newReplica(w.dir, name, binary, consul, nomad, flags)
}

// flags returns the flags of every replica.
func flags(cleanup string) []string {
	return []string{"-kv-prefix=" + prefix, "-instance=" + instance, "-job-template=raw_exec",
		"-cleanup-interval=" + cleanup, "-log-level=debug"}
}

// stop stops everything. With keep it saves the servers' logs with the
// replicas' logs.
func (w *world) stop(keep bool) error {
	w.halt()
	var errs []error
	for _, r := range w.all() {
		errs = append(errs, r.close())
	}
	if keep {
		errs = append(errs, w.keepLogs())
	}
	if w.nomad != nil {
		errs = append(errs, w.nomad.Stop())
	}
	if w.nodeHelpers != nil {
		errs = append(errs, w.nodeHelpers.Stop())
	}
	if w.consul != nil {
		errs = append(errs, w.consul.Stop())
	}
	return errors.Join(errs...)
}

// all returns the replicas and the neighbour.
func (w *world) all() []*replica {
	if w.neighbour == nil {
		return w.replicas
	}
	return append(slices.Clone(w.replicas), w.neighbour)
}

func (w *world) agents() []*stack.Agent {
	var all []*stack.Agent
	if w.consul != nil {
		all = append(all, w.consul.Servers...)
	}
	if w.nomad != nil {
		all = append(append(all, w.nomad.Servers...), w.nomad.Clients...)
	}
	return all
}

func (w *world) keepLogs() error {
	var errs []error
	for _, a := range w.agents() {
		name := a.Name
		if !strings.HasPrefix(name, "consul") {
			name = "nomad-" + name
		}
		errs = append(errs, copyFile(a.Log, filepath.Join(w.dir, name+".log")))
	}
	return errors.Join(errs...)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return errors.Join(err, in.Close())
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close(), in.Close())
}

// watch starts to count sandboxes, and to follow the agreed time and the events.
func (w *world) watch(ctx context.Context) {
	ctx, w.stopped = context.WithCancel(context.WithoutCancel(ctx))
	w.counting.Go(func() { w.census.run(ctx) })
	w.counting.Go(func() { w.told.clock.follow(ctx, w.kv.KV()) })
	for _, r := range w.replicas {
		reader := &reader{replica: r}
		w.readers = append(w.readers, reader)
		w.counting.Go(func() { reader.run(ctx) })
	}
}

// halt stops the counting.
func (w *world) halt() {
	w.stopped()
	w.counting.Wait()
}

// draw draws a random number from the seed.
func (w *world) draw() uint64 {
	w.randomMu.Lock()
	defer w.randomMu.Unlock()
	return w.random.Uint64()
}

// below draws a number from 0 to n-1.
func (w *world) below(n int) int { return int(w.draw() % uint64(n)) }

// between draws a duration.
func (w *world) between(from, to time.Duration) time.Duration {
	return from + time.Duration(w.draw()%uint64(to-from))
}
