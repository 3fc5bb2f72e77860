package simulate

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/scheduler"
)

// plan holds everything that the seed decides before a run begins.
type plan struct {
	seed    uint64
	hosts   int
	chats   int
	callers [][]request
	faults  []fault
	odds    network.Odds
	calm    time.Duration // when the last fault is over

	skews           []time.Duration // of each replica's clock
	expire          float64         // a session expires after this multiple of its TTL
	nodes           int
	capacity        int
	slowNomad       bool
	neighbour       bool   // another Bivouac has a sandbox on the same Nomad
	pool            int    // size of the pool at first; 0: there is none
	killAt          string // point at which a replica is killed; see pass
	again           bool   // create the session of each chat once more in the end
	ttl             time.Duration
	cleanupInterval time.Duration
}

// request is one request of a caller.
type request struct {
	after   time.Duration
	kind    string
	chat    int
	replica int
	agent   string
	ttl     time.Duration // 0 means the default
	patient time.Duration // the caller gives up after this time; 0 means never
}

func (r request) String() string {
	s := fmt.Sprintf("%s chat %d at replica %d", r.kind, r.chat, r.replica)
	if r.kind == "create" {
		s += fmt.Sprintf(" for %s, ttl %v", r.agent, r.ttl)
	}
	if r.patient > 0 {
		s += fmt.Sprintf(", gives up after %v", r.patient)
	}
	return s
}

// fault is one fault, with its time and duration.
type fault struct {
	at, lasts time.Duration
	kind      string
	which     int
	// into is the delay between the next request of a caller and the fault,
	// which then hits the replica that was asked. 0 means that the fault waits
	// for no request. With ofStart the fault waits for the next start of a
	// process and hits its node. With ofSpare it waits for the next write of a
	// spare's record and hits the replica that makes it.
	into    time.Duration
	ofStart bool
	ofSpare bool
}

func (f fault) String() string {
	s := fmt.Sprintf("%s %d at %v for %v", f.kind, f.which, f.at, f.lasts)
	if f.into > 0 {
		what := "request"
		if f.ofStart {
			what = "start"
		} else if f.ofSpare {
			what = "write of a spare"
		}
		s += fmt.Sprintf(", %v into the next %s", f.into, what)
	}
	return s
}

// period is the time during which faults may begin.
const period = 30 * time.Second

func newPlan(seed uint64) plan {
	rng := rand.New(rand.NewPCG(seed, 0))
	p := plan{
		seed:            seed,
		hosts:           2 + rng.IntN(2),
		chats:           1 + rng.IntN(2),
		expire:          2,
		nodes:           1 + rng.IntN(3),
		capacity:        1 + rng.IntN(4),
		slowNomad:       rng.IntN(4) == 0,
		ttl:             time.Minute,
		cleanupInterval: between(rng, 5*time.Second, 15*time.Second),
	}
	if rng.IntN(3) == 0 {
		p.expire = 1 + rng.Float64()
	}
	skewed := rng.IntN(2) == 0
	for range p.hosts {
		var skew time.Duration
		if skewed {
			skew = between(rng, -150*time.Second, 150*time.Second)
		}
		p.skews = append(p.skews, skew)
	}
	for range 2 + rng.IntN(2) {
		var requests []request
		for range 2 + rng.IntN(4) {
			requests = append(requests, p.newRequest(rng))
		}
		p.callers = append(p.callers, requests)
	}
	for range rng.IntN(5) {
		f := p.newFault(rng)
		p.faults = append(p.faults, f)
		p.calm = max(p.calm, f.at+f.lasts)
	}
	if rng.IntN(40) == 0 {
		p.loseNodeForLong(rng, "node agent dead")
	} else if rng.IntN(60) == 0 {
		p.loseNodeForLong(rng, "node cut")
	}
	p.odds = newOdds(rng)
	if p.odds != (network.Odds{}) {
		p.calm = max(p.calm, period)
	}
	if rng.IntN(3) == 0 {
		p.neighbour = true
		p.capacity++ // for its sandbox
	}
	if rng.IntN(40) == 0 {
		p.hangForLong(rng)
	}
	if rng.IntN(2) == 0 {
		p.addPool(rng)
	}
	return p
}

// maxPool is the largest size of a pool.
const maxPool = 6

// addPool adds a pool and faults of its own. There is always room for all spares and
// their successors.
func (p *plan) addPool(rng *rand.Rand) {
	p.pool = 1 + rng.IntN(maxPool)
	p.capacity += 3 * maxPool
	for range rng.IntN(4) {
		f := fault{
			at:    between(rng, 0, period),
			lasts: between(rng, 100*time.Millisecond, 20*time.Second),
			kind:  poolKinds[rng.IntN(len(poolKinds))],
			which: rng.IntN(12),
		}
		if slices.Contains(kinds, f.kind) { // between two steps of a fill or a claim
			f.into, f.ofSpare = 1+time.Duration(rng.ExpFloat64()*float64(10*time.Millisecond)), true
		}
		p.faults = append(p.faults, f)
		p.calm = max(p.calm, f.at+f.lasts)
	}
}

// hangForLong makes a delete meet a stop that hangs for longer than any caller
// waits.
func (p *plan) hangForLong(rng *rand.Rand) {
	create := request{kind: "create", agent: "agent-1", replica: rng.IntN(p.hosts), ttl: 20 * time.Minute}
	p.callers[0] = append([]request{create, {kind: "delete", after: 3 * time.Second}}, p.callers[0]...)
	f := fault{at: 2 * time.Second, lasts: between(rng, 65*time.Second, 90*time.Second), kind: "stop hangs"}
	p.faults = append(p.faults, f)
	p.calm = max(p.calm, f.at+f.lasts)
}

// loseNodeForLong loses a node, perhaps before it has reported that a sandbox
// runs. It lasts longer than Nomad waits for the node's agent to stop its
// sandboxes; an agent that is only cut off does stop them. Sessions live long
// enough for that.
func (p *plan) loseNodeForLong(rng *rand.Rand, kind string) {
	p.nodes, p.ttl = max(p.nodes, 2), 20*time.Minute
	for _, requests := range p.callers {
		for i := range requests {
			requests[i].ttl = 0
		}
	}
	f := fault{
		at:    between(rng, 0, 10*time.Second),
		lasts: between(rng, 345*time.Second, 7*time.Minute),
		kind:  kind,
		into:  between(rng, time.Millisecond, 500*time.Millisecond), ofStart: true,
	}
	p.faults = append(p.faults, f)
	p.calm = max(p.calm, f.at+f.lasts)
}

func between(rng *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(rng.Int64N(int64(most-least)))
}

func (p plan) newRequest(rng *rand.Rand) request {
	r := request{
		after:   time.Duration(rng.ExpFloat64() * float64(3*time.Second)),
		chat:    rng.IntN(p.chats),
		replica: rng.IntN(p.hosts),
		agent:   "agent-1",
		kind:    "create",
	}
	if rng.IntN(4) == 0 { // at nearly the same time as others
		r.after = between(rng, 0, 50*time.Millisecond)
	}
	switch n := rng.IntN(100); {
	case n < 20:
		r.kind = "delete"
	case n < 32:
		r.kind = "renew"
	case n < 45:
		r.kind = "get"
	}
	if rng.IntN(8) == 0 {
		r.agent = "agent-2"
	}
	if rng.IntN(4) == 0 {
		r.ttl = between(rng, scheduler.MinTTL, 20*time.Second)
	}
	if rng.IntN(8) == 0 {
		r.patient = between(rng, time.Millisecond, 2*time.Second)
	}
	return r
}

// kinds lists the kinds of faults. A kind that should be frequent appears more
// than once.
var kinds = []string{
	"crash", "crash", "stop", "pause", "pause", "cut consul", "cut nomad", "cut both", "consul leader",
	"nomad leader", "node cut", "node agent dead", "sandbox dies", "sandbox dies", "no room", "streams break",
	"session destroyed", "lock deleted", "job stopped", "task restarted", "task restarted", "node reboots",
	"clock set ahead", "clock set back", "clock deleted", "record deleted", "store set back", "store wiped",
	"stop hangs", "token without rights",
}

// poolKinds lists the kinds of faults that runs with a pool have besides the others.
var poolKinds = []string{
	"crash", "crash", "pause", "cut consul", "cut nomad", "session destroyed",
	"helper down", "helper hangs", "spare dies", "spare does not answer", "pool changed", "pool changed",
}

func (p plan) newFault(rng *rand.Rand) fault {
	f := fault{
		at:    between(rng, 0, period),
		lasts: between(rng, 100*time.Millisecond, 8*time.Second),
		kind:  kinds[rng.IntN(len(kinds))],
		which: rng.IntN(12),
	}
	if rng.IntN(2) == 0 {
		f.into = time.Duration(rng.ExpFloat64() * float64(700*time.Millisecond))
	}
	if rng.IntN(2) == 0 { // long enough to outlast locks and heartbeats
		f.lasts = between(rng, 8*time.Second, 40*time.Second)
	}
	return f
}

// newOdds makes some runs quiet and some faults likely in others.
func newOdds(rng *rand.Rand) network.Odds {
	var odds network.Odds
	if rng.IntN(3) == 0 {
		return odds
	}
	for _, chance := range []*float64{
		&odds.LoseRequest, &odds.LoseReply, &odds.Late, &odds.LateReply, &odds.Fail, &odds.Busy,
	} {
		if rng.IntN(3) == 0 {
			*chance = rng.Float64() * 0.15
		}
	}
	odds.Busy *= 4 // a server that is overloaded refuses many requests
	return odds
}
