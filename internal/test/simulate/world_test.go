package simulate

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/test/simulate/consulmodel"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
)

const instance = "simulation"

// template is a job template like users have. The model ignores what it runs.
const template = `
variable "variant" {
  default = ""
}

ready {
  port    = "http"
  timeout = "12s"
}

job {
  datacenters = ["*"]

  group "sandbox" {
    network {
      port "http" {}
    }

    task "sandbox" {
      driver       = "raw_exec"
      kill_timeout = "5s"

      config {
        command = "sandbox"
        args    = [var.variant]
      }
    }
  }
}
`

// world is the state of one run.
type world struct {
	plan
	templates []*jobs.Template // the variants
	began     time.Time
	ctx       context.Context // for the network and the servers; ends last
	net       *network.Network
	helpers   *helpers
	consul    *consulmodel.Server
	nomad     *nomadmodel.Server
	chatIDs   []uuid.UUID

	// remains counts the goroutines of replicas, including crashed ones. Time
	// stops for them when the run has returned.
	remains sync.WaitGroup

	mu         sync.Mutex
	replicas   []*replica  // by number; a restarted one takes the place of the old one
	over       bool        // start no more replicas
	asked      *occasion   // a request to the replica of that number
	started    *occasion   // a process start on the node of that number
	written    *occasion   // a write of a spare's record by the replica of that number
	pools      poolPlan    // what a replica that starts gets
	requests   map[int]int // how many each caller made
	history    []call
	deaths     []death
	cutNodes   map[string]int           // number of faults that cut the node off, by node ID
	edited     map[string]bool          // chats whose records were changed by hand
	alive      map[string]int           // live processes by chat
	living     map[string]int           // live processes by session; 0 for those that have ended
	bound      map[string]binding       // what helpers gave to spares, by session
	ordered    map[string]string        // chats for which a helper was asked to do so, by session
	muted      map[string]time.Duration // since when spares do not answer, by session
	unrecorded map[string]bool          // sessions of claimed spares that lost their records
	lastStart  time.Duration            // when a replica last started
	astray     map[string]bool          // those of them that need not be found
	tokens     map[string]string        // access tokens of processes that were ever started, by session
	killed     bool                     // killAt was passed
	killedAt   time.Duration
	settledAt  time.Duration
	settled    time.Duration // time until the run settled
	hits       hits
	followers  []*follower // one for each place of a replica
	wiped      bool        // the store lost its changes
	changes    int         // number of changes that were compared
	violations []string
	trace      []event
}

// death is the end or loss of a sandbox that no caller asked for.
type death struct {
	sessionID string
	at        time.Duration
	why       string
}

// run carries out a plan in a bubble of simulated time.
func run(t *testing.T, p plan, templates []*jobs.Template) *world {
	ctx, cancel := context.WithCancel(t.Context())
	w := &world{
		plan: p, templates: templates, ctx: ctx, began: time.Now(),
		requests: make(map[int]int), asked: newOccasion(), started: newOccasion(), written: newOccasion(), pools: poolPlan{size: p.pool}, cutNodes: make(map[string]int), edited: make(map[string]bool), alive: make(map[string]int), living: make(map[string]int), tokens: make(map[string]string), bound: make(map[string]binding), ordered: make(map[string]string), muted: make(map[string]time.Duration), unrecorded: make(map[string]bool), astray: make(map[string]bool), hits: hits{times: make(map[string]int)},
	}
	w.net = network.New(ctx, p.seed, func(host, event string) { w.note("%s: %s", host, event) })
	w.consul = consulmodel.New(p.expire)
	config := nomadmodel.Config{
		Service:  helperService,
		SaveTime: 200 * time.Millisecond, // so that it happens
		Nodes:    p.nodes, Capacity: p.capacity, Slow: p.slowNomad, Rand: w.net.Rand,
		Started: w.processStarted, Ended: w.processEnded,
		Stopped: func(p nomadmodel.Process) { w.hits.count(stoppedByNode, !isNeighbours(p.Meta)) },
		Twice:   func(p nomadmodel.Process) { w.hits.count(startedTwice, !isNeighbours(p.Meta)) },
		Trace:   func(event string) { w.note("nomad: %s", event) },
	}
	w.nomad = nomadmodel.New(ctx, config)
	w.helpers = newHelpers(w)
	for i := range p.chats {
		w.chatIDs = append(w.chatIDs, uuid.NewSHA1(uuid.NameSpaceURL, []byte(strconv.Itoa(i))))
	}
	if p.neighbour {
		w.addNeighbour()
	}
	w.replicas = make([]*replica, p.hosts)
	for i := range p.hosts {
		w.start(i, fmt.Sprintf("replica-%d", i))
	}

	w.hits.count(withPool, p.pool > 0)
	w.follow()
	w.net.SetOdds(p.odds)
	var all sync.WaitGroup
	for i, requests := range p.callers {
		all.Go(func() { w.call(1+i, requests) })
	}
	for i, f := range p.faults {
		all.Go(func() { w.provoke(i, f) })
	}
	all.Go(func() {
		wait(ctx, p.calm)
		w.net.SetOdds(network.Odds{})
	})
	all.Wait()
	w.settle()
	w.settledAt = w.now()
	if p.again {
		w.createAgain()
	}
	w.lastLook()
	w.checkAnswers()
	w.checkChanges()
	w.checkNeighbour()

	w.mu.Lock()
	w.over = true
	w.mu.Unlock()
	for _, r := range w.replicas {
		r.stop()
	}
	w.consul.Close()
	cancel()
	w.remains.Wait()
	return w
}

func wait(ctx context.Context, d time.Duration) { _ = backoff.Sleep(ctx, d) }

func (w *world) now() time.Duration { return time.Since(w.began) }

func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, event{w.now(), format, args})
}

func (w *world) violate(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	w.note("VIOLATION: %s", text)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violations = append(w.violations, fmt.Sprintf("at %v: %s", w.now(), text))
}

// dial connects to the port of a sandbox's process.
func (w *world) dial(_ context.Context, _, address string) (net.Conn, error) {
	_, text, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	if !w.nomad.Answers(port) {
		return nil, fmt.Errorf("dial %s: connection refused", address)
	}
	ours, theirs := net.Pipe()
	if err := theirs.Close(); err != nil {
		return nil, err
	}
	return ours, nil
}
