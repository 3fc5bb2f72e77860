// Package network carries the requests of simulated replicas to models of
// servers and injects faults: requests are late, get lost or arrive after their
// sender gave up, and answers never arrive.
//
// The fate of a request depends on the seed, on the sender, on what it asks and
// on how often it asked that before. Goroutines that run at the same instant
// therefore do not change each other's fate, whichever goes first. The package
// must never know what the requests are about.
package network

import (
	"bytes"
	"context"
	"errors"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/bivouac/bivouac/internal/backoff"
)

// Server answers requests. ctx is done when the connection ends.
type Server interface {
	Serve(ctx context.Context, req *http.Request, body []byte) *http.Response
}

// Odds are the probabilities, from 0 to 1, of the faults of a request.
type Odds struct {
	LoseRequest float64 // it does not arrive
	LoseReply   float64 // it is applied but the answer does not arrive
	Late        float64 // it arrives up to MaxLate late, and is applied even if nobody waits any more
	LateReply   float64 // the answer arrives up to 10 s late
	Fail        float64 // the server answers 500 and applies nothing
	Busy        float64 // the server answers 429 and applies nothing
}

// MaxLate is how late a request may arrive.
const MaxLate = 30 * time.Second

// Network connects hosts with servers.
type Network struct {
	ctx   context.Context // ends with the simulation
	seed  uint64
	trace func(host, event string)

	mu    sync.Mutex
	asked map[string]uint64 // how often, by sender and request
	odds  Odds
	fates map[string]int
}

// New returns a network that works until ctx is done. It calls trace for each
// request.
func New(ctx context.Context, seed uint64, trace func(host, event string)) *Network {
	return &Network{ctx: ctx, seed: seed, trace: trace, asked: make(map[string]uint64), fates: make(map[string]int)}
}

// These are the possible fates of requests.
const (
	RequestsLost = "requests lost"
	RepliesLost  = "replies lost"
	RequestsLate = "requests late"
	RepliesLate  = "replies late"
	Failed       = "500"
	Refused      = "429"
	HeldBack     = "held back by a cut"
)

// Fates returns how many requests met each fate.
func (n *Network) Fates() map[string]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.fates)
}

func (n *Network) befalls(fate string, yes bool) {
	if yes {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.fates[fate]++
	}
}

// SetOdds sets the odds for all later requests.
func (n *Network) SetOdds(odds Odds) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.odds = odds
}

// Rand returns a random source for a name, a different one on each call.
func (n *Network) Rand(name string) *rand.Rand {
	n.mu.Lock()
	count := n.asked[name]
	n.asked[name]++
	n.mu.Unlock()
	h := fnv.New64a()
	_, _ = io.WriteString(h, name)
	return rand.New(rand.NewPCG(n.seed^h.Sum64(), count))
}

type callerKey struct{}

// WithCaller returns a context whose requests belong to a caller. Requests of
// different callers do not change each other's fate.
func WithCaller(ctx context.Context, caller string) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// Caller returns the caller of the requests of ctx, or "" if it has none.
func Caller(ctx context.Context) string {
	caller, _ := ctx.Value(callerKey{}).(string)
	return caller
}

// ErrReset is the error of a sender whose connection broke.
var ErrReset = errors.New("connection reset by peer")

// Link connects a host to one server. It is an [http.RoundTripper].
type Link struct {
	net    *Network
	host   *Host
	server Server

	mu     sync.Mutex
	healed chan struct{} // not nil while the link is cut; closed by Heal
}

// Link returns the host's link to a server.
func (n *Network) Link(host *Host, server Server) *Link {
	return &Link{net: n, host: host, server: server}
}

// Cut lets nothing through in either direction until Heal. What is sent in the
// meantime may arrive after that.
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.healed == nil {
		l.healed = make(chan struct{})
	}
}

// Heal ends a Cut.
func (l *Link) Heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.healed != nil {
		close(l.healed)
		l.healed = nil
	}
}

func (l *Link) cut() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.healed
}

// pass waits while the link is cut and reports whether it was never cut. It
// then waits for turn, as after a pause.
func (l *Link) pass(turn time.Duration) bool {
	clean := true
	for {
		healed := l.cut()
		if healed == nil {
			return clean
		}
		clean = false
		select {
		case <-healed:
			sleep(l.net.ctx, turn)
		case <-l.net.ctx.Done():
			return false
		}
	}
}

// RoundTrip implements [http.RoundTripper].
func (l *Link) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
		req.Body.Close()
	}
	what := label(req, body)
	ctx := req.Context()
	rng := l.net.Rand(l.host.Name + " " + Caller(ctx) + " " + what)
	turn := Latency(rng)
	if sleep(ctx, Latency(rng)); ctx.Err() != nil { // if both happen at the same instant, giving up comes first
		return nil, ctx.Err()
	}
	if slept := l.host.awaitRunning(l.net.ctx, turn); slept && ctx.Err() != nil && rng.IntN(2) == 0 {
		return nil, ctx.Err() // it gave up before it sent anything
	}
	if l.host.isDead() {
		return l.nothing(ctx)
	}

	answered := make(chan *http.Response, 1) // nil: the connection broke
	connection, hangUp := context.WithCancel(l.net.ctx)
	go l.carry(connection, req, body, what, rng, answered)
	var resp *http.Response
	select {
	case resp = <-answered:
	case <-ctx.Done():
	}
	l.host.awaitRunning(l.net.ctx, turn)
	switch {
	case l.host.isDead():
		hangUp()
		return l.nothing(ctx)
	case resp == nil && ctx.Err() != nil:
		hangUp()
		return nil, ctx.Err()
	case resp == nil:
		hangUp()
		return nil, ErrReset
	}
	resp.Request = req
	keep := context.AfterFunc(ctx, hangUp) // a read of the body ends with the request's context
	resp.Body = &connBody{link: l, turn: turn, ctx: ctx, from: resp.Body, hangUp: func() {
		keep()
		hangUp()
	}}
	return resp, nil
}

// nothing is the answer to a dead host. It waits for ctx, so that time passes
// for the host's goroutines and they can be cleaned up.
func (l *Link) nothing(ctx context.Context) (*http.Response, error) {
	select {
	case <-ctx.Done():
	case <-l.net.ctx.Done():
	}
	return nil, ErrReset
}

// carry takes a request to the server and the answer back. It continues after
// the sender has given up.
func (l *Link) carry(connection context.Context, req *http.Request, body []byte, what string, rng *rand.Rand, answered chan<- *http.Response) {
	odds := l.oddsNow()
	there, back := Latency(rng), Latency(rng)
	lost, lostReply := rng.Float64() < odds.LoseRequest, rng.Float64() < odds.LoseReply
	late := rng.Float64() < odds.Late
	if late {
		there += time.Duration(rng.Int64N(int64(MaxLate)))
	}
	lateReply := rng.Float64() < odds.LateReply
	if lateReply {
		back += time.Duration(rng.Int64N(int64(10 * time.Second)))
	}
	refused := 0
	switch r := rng.Float64(); {
	case r < odds.Fail:
		refused = http.StatusInternalServerError
	case r < odds.Fail+odds.Busy:
		refused = http.StatusTooManyRequests
	}
	survives := rng.IntN(2) == 0 // whether it survives a cut
	turn := Latency(rng)

	l.net.befalls(RequestsLate, late)
	sleep(l.net.ctx, there)
	clean := l.pass(turn)
	l.net.befalls(HeldBack, !clean)
	l.net.befalls(RequestsLost, lost)
	if lost || !clean && !survives || l.net.ctx.Err() != nil {
		l.net.trace(l.host.Name, what+" is lost")
		sleep(l.net.ctx, back+time.Duration(rng.Int64N(int64(3*time.Second))))
		answered <- nil
		return
	}
	if lostReply { // the connection breaks at a random time, perhaps before the server is done
		After(l.net.ctx, time.Duration(rng.ExpFloat64()*float64(50*time.Millisecond)), func() { answered <- nil })
	}
	l.net.befalls(RepliesLost, lostReply)
	l.net.befalls(RepliesLate, !lostReply && lateReply)
	l.net.befalls(Failed, refused == http.StatusInternalServerError)
	l.net.befalls(Refused, refused == http.StatusTooManyRequests)
	var resp *http.Response
	if refused != 0 {
		resp = Text(refused, http.StatusText(refused))
	} else {
		resp = l.server.Serve(connection, req, body)
	}
	l.net.trace(l.host.Name, what+" "+strconv.Itoa(resp.StatusCode)+l.outcome(resp, lostReply))
	if lostReply {
		resp.Body.Close()
		return
	}
	sleep(l.net.ctx, back)
	if clean := l.pass(turn); !clean && !survives {
		resp.Body.Close()
		resp = nil
	}
	answered <- resp
}

func (l *Link) outcome(resp *http.Response, lost bool) string {
	switch {
	case lost:
		return ", and the reply is lost"
	case resp.StatusCode >= 400 && resp.StatusCode != http.StatusNotFound:
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			return err.Error()
		}
		resp.Body = io.NopCloser(bytes.NewReader(text))
		return " " + string(text)
	default:
		return ""
	}
}

func (l *Link) oddsNow() Odds {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	return l.net.odds
}

// Latency returns a delay of a healthy network. It never returns the same delay
// twice, so that no two results of requests happen at the same instant.
func Latency(rng *rand.Rand) time.Duration {
	return 50*time.Microsecond + time.Duration(rng.ExpFloat64()*float64(700*time.Microsecond))
}

// label describes what a request asks, without the parts that are random in
// each request.
func label(req *http.Request, body []byte) string {
	var what strings.Builder
	what.WriteString(req.Method + " " + req.URL.Path)
	if query := req.URL.Query(); query.Has("purge") {
		what.WriteString(" purge=" + query.Get("purge"))
	}
	if strings.HasSuffix(req.URL.Path, "/txn") {
		for range 2 { // the first two keys and verbs identify the kind
			for _, field := range []string{`"Verb":"`, `"Key":"`} {
				if _, rest, ok := bytes.Cut(body, []byte(field)); ok {
					value, _, _ := bytes.Cut(rest, []byte(`"`))
					what.WriteString(" " + string(value))
					body = rest
				}
			}
		}
	}
	return what.String()
}

// sleep waits for d or until ctx is done.
func sleep(ctx context.Context, d time.Duration) { _ = backoff.Sleep(ctx, d) }
