//go:build faults

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/apiclient"
	"github.com/bivouac/bivouac/internal/httpapi/wire"
	"github.com/bivouac/bivouac/internal/stack"
)

// What a chat has in the end.
const (
	nothing    = "nothing"     // no record and no sandbox
	newSession = "new session" // one that stands, with its sandbox
	oldSession = "old session" // the one that stood before, untouched
	oldRecord  = "old record"  // that of a session whose sandbox has ended
)

// What a chat has before the operation.
const (
	fresh   = "fresh"   // nothing
	stands  = "stands"  // a session
	ended   = "ended"   // a session whose sandbox ended
	expired = "expired" // a session that has expired
)

// operations are what a replica is killed in the middle of: what the chat has
// before, and each of its steps with what the chat has once that is settled.
var operations = []struct {
	name   string
	before string
	steps  []step
}{
	{"create", fresh, []step{
		{"lock:before", nothing}, {"lock:after", nothing},
		{"write-creating:before", nothing}, {"write-creating:after", nothing},
		{"create:before", nothing}, {registered, nothing},
		{"create:placed", nothing}, {"create:ready", nothing}, {"create:after", nothing},
		{"write-running:before", nothing}, {"write-running:after", newSession},
	}},
	{"replace", ended, []step{
		{"lock:after", oldRecord}, {"write-stopping:before", oldRecord}, {"write-stopping:after", nothing},
		{"stop:before", nothing}, {"stop:after", nothing},
		{"write-creating:before", nothing}, {"write-creating:after", nothing},
		{registered, nothing}, {"create:after", nothing}, {"write-running:after", newSession},
	}},
	{"delete", stands, []step{
		{"lock:before", oldSession}, {"lock:after", oldSession},
		{"write-stopping:before", oldSession}, {"write-stopping:after", nothing},
		{"delete:before", nothing}, {deregistered, nothing}, {"delete:after", nothing},
		{"remove:before", nothing}, {"remove:after", nothing},
	}},
	{"cleanup", expired, []step{
		{"lock:after", nothing}, {"write-stopping:before", nothing}, {"write-stopping:after", nothing},
		{"stop:before", nothing}, {deregistered, nothing}, {"stop:after", nothing},
		{"remove:before", nothing}, {"remove:after", nothing},
	}},
	{"renew", stands, []step{
		{"lock:after", oldSession}, {"write-expiry:before", oldSession}, {"write-expiry:after", oldSession},
	}},
}

// step is a point of an operation, and what the chat has when a replica that was
// killed there is settled.
type step struct{ point, then string }

// Steps inside the driver are seen from what Nomad has answered.
const (
	registered   = "job registered"
	deregistered = "job deregistered"
)

// victim is a replica that is killed at one step of an operation on one chat.
type victim struct {
	*replica
	operation, before string
	step
	chat uuid.UUID
	old  wire.Session // that stood before
	died time.Time
	took time.Duration
	left string // what is not as it should be yet
	by   string // who settled it
}

// look is what there was at a time.
type look struct {
	began   time.Time
	records map[uuid.UUID]record
	left    []string
}

// A replica that is killed at any step leaves something that others settle.
func TestReplicaKilledAtEachStepIsSettledByOthers(t *testing.T) {
	ctx := t.Context()
	w := testWorld(t)
	survivor := w.survivor(t, "survivor-0", "1h")
	victims := w.victims(t)
	w.census = newCensus(w.chats, w.log, w.told)
	w.watch(ctx)
	t.Cleanup(w.halt)

	var looks atomic.Pointer[look]
	looking, enough := context.WithCancel(ctx)
	var looker sync.WaitGroup
	looker.Go(func() {
		for looking.Err() == nil {
			now := &look{began: time.Now()}
			now.records, now.left = w.survey(looking)
			looks.Store(now)
			pause(looking, 100*time.Millisecond)
		}
	})
	t.Cleanup(looker.Wait)
	t.Cleanup(enough)

	// Given replicas that are killed in the middle of a cleanup, one after the
	// other, since each cleans up whatever has expired …
	var settling sync.WaitGroup
	settle := func(v *victim) {
		for v.left = "not looked at"; v.left != "" && v.took <= settleLimit; pause(ctx, 50*time.Millisecond) {
			if now := looks.Load(); now != nil && now.began.After(v.died) {
				v.took, v.left = now.began.Sub(v.died), w.unsettled(v, now.records, now.left)
			}
		}
	}
	var cleaners, others []*victim
	for _, v := range victims {
		if v.operation != "cleanup" {
			others = append(others, v)
			continue
		}
		w.prepare(t, survivor, v)
		w.die(t, v)
		cleaners = append(cleaners, v)
	}
	last := cleaners[len(cleaners)-1].died
	for _, v := range cleaners {
		v.died = last // until then another may have died with this one's chat in its hands
		settling.Go(func() { settle(v) })
	}
	w.survivor(t, "survivor-1", "5s") // … and one that cleans up what they leave,
	for _, v := range others {        // and replicas that are killed in all other operations,
		settling.Go(func() {
			w.prepare(t, survivor, v)
			w.die(t, v)
			settle(v)
		})
	}

	// then what each left in flight is settled within the limit, …
	settling.Wait()
	w.nameSettlers(t, victims)
	t.Logf("\n%s", table(victims))
	must.False(t, t.Failed())
	for _, v := range victims {
		must.Eq(t, "", v.left, must.Sprintf("%s killed at %s", v.operation, v.point))
	}

	// and a create gives each chat one sandbox.
	for _, v := range victims {
		res, err := survivor.api.Create(ctx, v.chat, w.load.input("agent-1", time.Hour))
		must.NoError(t, err, must.Sprintf("%s killed at %s", v.operation, v.point))
		must.NoError(t, w.load.knock(res.Session))
		if v.then == oldSession {
			must.Eq(t, v.old.SessionID, res.Session.SessionID)
		}
		_, err = survivor.api.Delete(ctx, v.chat)
		must.NoError(t, err)
	}
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}

func testWorld(t *testing.T) *world {
	dir := t.TempDir()
	log, err := newTimeline(dir)
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, log.close()) })
	consul, _ := stack.ConsulForTest(t)
	nomad := stack.NomadForTest(t)
	w := &world{plan: plan{binary: filepath.Join(dir, "bivouac")}, dir: dir, log: log, told: newLedger(log), stopped: func() {}}
	w.kv, err = consul.Client()
	must.NoError(t, err)
	w.jobs, err = nomad.Client()
	must.NoError(t, err)
	w.load = &load{volume: dir, log: log, told: w.told}
	must.NoError(t, stack.BuildBivouac(t.Context(), w.plan.binary, "failpoints"))
	return w
}

// replica makes a replica that is not yet started.
func (w *world) replica(t *testing.T, name, cleanup string) *replica {
	consul, err := newProxy([]string{strings.TrimPrefix(w.consulAddr(t), "http://")}, 0)
	must.NoError(t, err)
	nomad, err := newProxy([]string{strings.TrimPrefix(w.jobs.Address(), "http://")}, 0)
	must.NoError(t, err)
	r, err := newReplica(w.dir, name, w.plan.binary, consul, nomad, flags(cleanup))
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, r.close()) })
	return r
}

func (w *world) consulAddr(t *testing.T) string {
	c, _ := stack.ConsulForTest(t)
	return c.Addr()
}

func (w *world) survivor(t *testing.T, name, cleanup string) *replica {
	r := w.replica(t, name, cleanup)
	must.NoError(t, r.start(t.Context()))
	return r
}

// victims starts a replica for each step.
func (w *world) victims(t *testing.T) []*victim {
	var all []*victim
	var starting sync.WaitGroup
	for _, op := range operations {
		for _, s := range op.steps {
			v := &victim{operation: op.name, before: op.before, step: s, chat: uuid.New()}
			name := strings.NewReplacer(" ", "-", ":", "-").Replace(op.name + "-" + s.point)
			v.replica = w.replica(t, name, "1h")
			var env []string
			switch s.point {
			case registered:
				v.nomad.tell(v.killedBy(jobSent))
			case deregistered:
				v.nomad.tell(v.killedBy(func(r *http.Request, _ []byte) bool {
					return r.Method == http.MethodDelete && strings.HasPrefix(r.URL.Path, "/v1/job/")
				}))
			default:
				env = append(env, fmt.Sprintf("BIVOUAC_FAILPOINT=kill %s %s", s.point, v.chat))
			}
			starting.Go(func() {
				if err := v.start(t.Context(), env...); err != nil {
					t.Error(err)
				}
			})
			all = append(all, v)
			w.chats = append(w.chats, v.chat)
		}
	}
	starting.Wait()
	must.False(t, t.Failed())
	return all
}

// killedBy kills the replica once Nomad has answered a request, before the
// replica has the answer.
func (v *victim) killedBy(at moment) spy {
	return func(r *http.Request, body []byte) {
		if at(r, body) {
			_ = v.signal(syscall.SIGKILL) // it may be dead already
			<-v.done
		}
	}
}

// prepare gives the victim's chat what it has before the operation.
func (w *world) prepare(t *testing.T, survivor *replica, v *victim) {
	if v.before == fresh {
		return
	}
	ttl := time.Hour
	if v.before == expired {
		ttl = time.Second
	}
	res, err := survivor.api.Create(t.Context(), v.chat, w.load.input("agent-1", ttl))
	if err != nil {
		t.Errorf("prepare %s: %v", v.operation, err)
		return
	}
	v.old = res.Session
	switch v.before {
	case expired:
		pause(t.Context(), time.Until(v.old.ExpiresAt)+100*time.Millisecond)
	case ended:
		s := w.awaitProcess(t.Context(), v.old.SessionID)
		s.signal(syscall.SIGKILL)
		for index := uint64(0); ; { // until the victim knows that the sandbox has ended
			session, next, err := v.api.Get(t.Context(), v.chat, apiclient.Block{Index: index, Wait: time.Second})
			if err != nil {
				t.Errorf("prepare %s: %v", v.operation, err)
				return
			}
			if session.State == "dead" {
				return
			}
			index = next
		}
	}
}

func (w *world) awaitProcess(ctx context.Context, session uuid.UUID) *sandbox {
	for ctx.Err() == nil {
		if s := w.census.running()[session]; s != nil {
			return s
		}
		pause(ctx, scanEvery)
	}
	return &sandbox{}
}

// die has the victim carry out its operation, and waits until it is dead.
func (w *world) die(t *testing.T, v *victim) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var err error
	switch v.operation {
	case "create", "replace":
		_, err = v.api.Create(ctx, v.chat, w.load.input("agent-1", time.Hour))
	case "delete":
		_, err = v.api.Delete(ctx, v.chat)
	case "renew":
		_, err = v.api.Renew(ctx, v.chat, 2*time.Hour)
	case "cleanup":
		_, err = v.api.Cleanup(ctx)
	}
	if _, answered := errors.AsType[*apiclient.Error](err); err == nil || answered || ctx.Err() != nil {
		t.Errorf("%s was not killed at %s: %v", v.operation, v.point, err)
		return
	}
	<-v.done
	v.died = time.Now()
}

// unsettled says what of a victim's chat is not as it should be.
func (w *world) unsettled(v *victim, records map[uuid.UUID]record, left []string) string {
	for _, l := range left {
		if strings.Contains(l, v.chat.String()) || records == nil {
			return l
		}
	}
	has := nothing
	for id, r := range records {
		switch {
		case r.ChatID != v.chat:
		case r.State != "running":
			has = oldRecord
		case id == v.old.SessionID:
			has = oldSession
		default:
			has = newSession
		}
	}
	if has != v.then {
		return "the chat has: " + has
	}
	return ""
}

// nameSettlers finds out from the replicas' logs who settled what each left.
func (w *world) nameSettlers(t *testing.T, victims []*victim) {
	logs, err := filepath.Glob(filepath.Join(w.dir, "*.log"))
	must.NoError(t, err)
	settled, cleaned := make(map[string]bool), make(map[string]bool)
	for _, name := range logs {
		text, err := os.ReadFile(name)
		must.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			_, rest, _ := strings.Cut(line, "chat_id=")
			chat, _, _ := strings.Cut(rest, " ")
			switch {
			case strings.Contains(line, "sandbox_settled: "):
				settled[chat] = true
			case strings.Contains(line, "sandbox_cleaned: "):
				cleaned[chat] = true
			}
		}
	}
	for _, v := range victims {
		switch chat := v.chat.String(); {
		case settled[chat]:
			v.by = "another replica, which finds it in flight"
		case cleaned[chat]:
			v.by = "another replica's cleanup"
		case v.took < 3*time.Second: // sooner than any lock ends
			v.by = "nothing was left"
		default:
			v.by = "Consul, which ends the lock"
		}
	}
}

func table(victims []*victim) string {
	var b strings.Builder
	out := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(out, "operation\tkilled at\tthen the chat has\tsettled after\tby\t")
	for _, v := range victims {
		_, _ = fmt.Fprintf(out, "%s\t%s\t%s\t%.1f s\t%s\t%s\n", v.operation, v.point, v.then, v.took.Seconds(), v.by, v.left)
	}
	_ = out.Flush() // all to memory
	return b.String()
}
