package simulate

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
	"github.com/bivouac/bivouac/scheduler"
)

// replica is one Bivouac process, assembled as the server does it.
type replica struct {
	name      string
	host      *network.Host
	tokens    [2]*token // for Consul and for Nomad
	consul    *network.Link
	nomad     *network.Link
	store     *consul.Store
	turns     turns
	clock     *consul.Clock
	scheduler *scheduler.Scheduler
	died      chan struct{} // closed when it crashes
	stop      func()        // stops it in order and waits
	crash     func()        // ends it at once
}

// start starts the i-th replica.
func (w *world) start(i int, name string) {
	r := &replica{name: name, host: network.NewHost(name), died: make(chan struct{})}
	r.tokens = [2]*token{{server: witness{w, i}, without: w.consul.WithoutRights()}, {server: w.nomad, without: w.nomad.WithoutRights()}}
	r.consul, r.nomad = w.net.Link(r.host, r.tokens[0]), w.net.Link(r.host, r.tokens[1])
	log := w.newLogger(name)
	consulClient, err := consul.NewClient(&consulapi.Config{HttpClient: &http.Client{Transport: r.consul}}, nil)
	if err != nil {
		panic(err)
	}
	nomadClient, err := nomadapi.NewClient(&nomadapi.Config{HttpClient: &http.Client{Transport: r.nomad}})
	if err != nil {
		panic(err)
	}
	w.mu.Lock()
	w.lastStart = w.now()
	w.mu.Unlock()
	w.loseTrack()
	pools := w.poolsNow()
	config := nomad.Config{Client: nomadClient, Template: w.templates[pools.variant], Logger: log.Named("nomad"), Dial: w.dial}
	if w.pool > 0 {
		config.Helper = helperClient{&http.Client{Transport: w.net.Link(r.host, w.helpers)}}
	}
	driver, err := nomad.New(config)
	if err != nil {
		panic(err)
	}
	r.clock, err = consul.NewClock(consulClient, consul.DefaultPrefix,
		func() time.Time { return time.Now().Add(w.skews[i]) }, log.Named("consul"))
	if err != nil {
		panic(err)
	}
	store, err := consul.New(consulClient, consul.Config{
		Instance: instance, Name: name, Logger: log.Named("consul"), Running: driver.Instances, Clock: r.clock,
	})
	if err != nil {
		panic(err)
	}
	r.store = store
	r.turns = turns{store, w.net, name}
	stepping := steppingStore{r.turns, w, r}
	r.scheduler, err = scheduler.New(scheduler.Config{
		Store:           stepping,
		Locker:          stepping,
		Drivers:         map[string]runtime.Driver{"nomad": steppingDriver{driver, w, r}},
		DefaultRuntime:  "nomad",
		TTL:             w.ttl,
		MaxTTL:          time.Hour,
		CleanupInterval: w.cleanupInterval,
		Logger:          log,
		Meter:           metricnoop.Meter{},
		Tracer:          tracenoop.Tracer{},
		Now:             r.clock.Now,
		Pools:           pools.config(),
	})
	if err != nil {
		panic(err)
	}
	identified := make(chan struct{})
	// They begin one after the other, and no two replicas begin at the same
	// instant.
	onceIdentified := func(nth int, run func(context.Context)) func(context.Context) {
		return func(ctx context.Context) {
			select {
			case <-identified:
				wait(ctx, time.Duration(1+nth+17*i)*41*time.Microsecond)
				run(ctx)
			case <-ctx.Done():
			}
		}
	}
	w.supervise(r, i, []func(context.Context){
		func(ctx context.Context) {
			if err := store.Run(ctx); err != nil && ctx.Err() == nil {
				w.note(logged, name+" ends: "+err.Error())
				w.remains.Go(func() { w.startAgain(i, r) })
			}
		},
		func(ctx context.Context) {
			own, err := store.Identity(ctx)
			if err == nil {
				driver.SetInstance(own.Instance, own.LegacyInstance)
				close(identified)
				<-ctx.Done()
			}
		},
		onceIdentified(1, func(ctx context.Context) { _ = r.clock.Run(ctx) }),
		onceIdentified(2, func(ctx context.Context) { _ = driver.Run(ctx) }),
		onceIdentified(3, func(ctx context.Context) { r.scheduler.Run(ctx) }),
	})
	w.mu.Lock()
	w.replicas[i] = r
	w.mu.Unlock()
	w.note("%s starts", name)
}

// token is a replica's token for Consul or Nomad.
type token struct {
	server, without network.Server // with all rights, and with none
	lost            atomic.Int32   // while it is not 0, the token permits nothing
	denied          atomic.Int32   // how many requests this affected
}

// Serve implements [network.Server]. A blocking read and an event stream keep the
// rights with which they began, as in Consul. Nomad would end the stream.
func (t *token) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	if t.lost.Load() == 0 {
		return t.server.Serve(ctx, req, body)
	}
	t.denied.Add(1)
	return t.without.Serve(ctx, req, body)
}

// startAgain restarts a replica that has ended by itself, as a process
// supervisor does.
func (w *world) startAgain(i int, r *replica) {
	r.stop()
	r.crash()
	w.mu.Lock()
	again := !w.over && w.replicas[i] == r
	w.mu.Unlock()
	if again {
		w.start(i, r.name+"+")
	}
}

// supervise runs the parts of a replica. A clean stop stops the last part
// first.
func (w *world) supervise(r *replica, i int, parts []func(context.Context)) {
	var cancels []context.CancelFunc
	var dones []*sync.WaitGroup
	for n, part := range parts {
		ctx, cancel := context.WithCancel(context.Background())
		done := new(sync.WaitGroup)
		// They begin one after the other, and no two replicas begin at the same
		// instant.
		w.remains.Add(1)
		done.Go(func() {
			defer w.remains.Done()
			wait(ctx, time.Duration(1+n+17*i)*37*time.Microsecond)
			part(ctx)
		})
		cancels, dones = append(cancels, cancel), append(dones, done)
	}
	stopped := make(chan struct{}) // waiting for a sync.Once would stop the bubble's time
	stopping := sync.OnceFunc(func() {
		go func() {
			defer close(stopped)
			for n, cancel := range slices.Backward(cancels) {
				cancel()
				dones[n].Wait()
			}
		}()
	})
	r.stop = func() {
		stopping()
		<-stopped
	}
	r.crash = sync.OnceFunc(func() {
		r.host.Kill()
		close(r.died)
		for _, cancel := range cancels {
			cancel()
		}
	})
}

func (r *replica) isDead() bool {
	select {
	case <-r.died:
		return true
	default:
		return false
	}
}

func (w *world) replica(i int) *replica {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.replicas[i%len(w.replicas)]
}

// turns is the store of a replica that delays each call a little, so that no
// two calls happen at the same instant, as the ticks of background work would.
// The Go runtime fires timers of the same instant in random order.
type turns struct {
	*consul.Store
	net  *network.Network
	name string
}

func (t turns) await(ctx context.Context, what string) {
	wait(ctx, network.Latency(t.net.Rand(t.name+" "+network.Caller(ctx)+" "+what)))
}

func (t turns) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (scheduler.Lease, error) {
	t.await(ctx, "locks "+chatID.String())
	return t.Store.Lock(ctx, chatID, wait)
}

func (t turns) Get(ctx context.Context, chatID uuid.UUID, block scheduler.Block) (*scheduler.Session, uint64, error) {
	t.await(ctx, "gets "+chatID.String())
	return t.Store.Get(ctx, chatID, block)
}

func (t turns) List(ctx context.Context, query scheduler.Query) (scheduler.Page, error) {
	t.await(ctx, "lists")
	return t.Store.List(ctx, query)
}

func (t turns) Expired(ctx context.Context, now time.Time, limit int) ([]scheduler.Session, error) {
	t.await(ctx, "looks for expired")
	return t.Store.Expired(ctx, now, limit)
}

func (t turns) InFlight(ctx context.Context) ([]scheduler.Session, error) {
	t.await(ctx, "looks for what is in flight")
	return t.Store.InFlight(ctx)
}

func (t turns) Changes(ctx context.Context, after uint64, wait time.Duration) ([]scheduler.Change, error) {
	t.await(ctx, "reads changes")
	return t.Store.Changes(ctx, after, wait)
}

func (t turns) Spares(ctx context.Context, block scheduler.Block) ([]scheduler.Spare, uint64, error) {
	t.await(ctx, "lists spares")
	return t.Store.Spares(ctx, block)
}

func (t turns) NoteChange(ctx context.Context, change scheduler.Change) error {
	t.await(ctx, "notes a change of "+change.ChatID.String())
	return t.Store.NoteChange(ctx, change)
}
