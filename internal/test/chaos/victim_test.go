package main

import (
	"bytes"
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

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/scheduler"
)

// victim is a replica that is killed or paused at one step of an operation on
// one chat.
type victim struct {
	*replica
	operation, before string
	step
	chat uuid.UUID
	old  wire.Session // the session before the operation
	// oldJob is the path of the old session's job. The proxy reads it while a
	// replica already runs.
	oldJob atomic.Value // string
	died   time.Time
	from   time.Time     // when settling could begin: at its death or later
	took   time.Duration // time since then
	left   string        // what is not settled yet
	by     string        // what settled it: a replica or Consul

	answered chan struct{} // closed when its caller has an answer
	session  uuid.UUID     // the session in that answer
	next     wire.Session  // created while it was paused
	err      error
}

// blow is what hits a victim. Its value is the name of the failpoint action.
type blow string

const (
	kill blow = "kill"
	halt blow = "pause"
)

// look is the state at one time.
type look struct {
	began   time.Time
	records map[uuid.UUID]record
	left    []string
}

// clockSlack is more than the times of two replicas may differ.
const clockSlack = 2 * time.Second

// stepLimit limits everything that happens before a replica is dead.
const stepLimit = 90 * time.Second

// lookOn observes the state repeatedly. last returns the latest observation.
func (w *world) lookOn(t *testing.T) (last func() *look) {
	w.census = newCensus(w.chats, w.log, w.told)
	w.watch(t.Context())
	t.Cleanup(w.halt)
	ctx, enough := context.WithCancel(t.Context())
	var now atomic.Pointer[look]
	var looking sync.WaitGroup
	looking.Go(func() {
		for ctx.Err() == nil {
			next := &look{began: time.Now()}
			seen := w.survey(ctx)
			next.records, next.left = seen.records, seen.left
			now.Store(next)
			pause(ctx, 200*time.Millisecond)
		}
	})
	t.Cleanup(looking.Wait)
	t.Cleanup(enough)
	return now.Load
}

// awaitSettled waits until what the victim left is settled, or until the limit
// has passed. Call it as soon as the victim is dead or the replicas are there
// that settle it: the first observation that finds it settled defines the time.
func (w *world) awaitSettled(ctx context.Context, v *victim, last func() *look) {
	v.from = time.Now()
	for v.left = "not looked at"; v.left != "" && ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
		now := last()
		if now == nil || now.began.Before(v.from) {
			continue
		}
		v.took, v.left = now.began.Sub(v.from), w.unsettled(v, now.records, now.left)
		if v.took > settleLimit {
			return
		}
	}
}

// awaitAllSettled calls awaitSettled for several victims.
func (w *world) awaitAllSettled(ctx context.Context, victims []*victim, last func() *look) {
	var all sync.WaitGroup
	for _, v := range victims {
		all.Go(func() { w.awaitSettled(ctx, v, last) })
	}
	all.Wait()
}

// victims creates a replica for each step of the operations that is hit at that
// step.
func (w *world) victims(t *testing.T, b blow, operations ...operation) []*victim {
	var all []*victim
	for _, op := range operations {
		for _, s := range op.steps {
			v := &victim{operation: op.name, before: op.before, step: s, chat: uuid.New()}
			name := strings.NewReplacer(" ", "-", ":", "-").Replace(op.name + "-" + s.point)
			v.replica = w.replica(t, name, "1h")
			switch s.point {
			case registered:
				v.nomad.tell(v.hitBy(b, func(r *http.Request, body []byte) bool {
					return jobSent(r, body) && bytes.Contains(body, []byte(v.chat.String()))
				}))
			case deregistered, purged:
				v.nomad.tell(v.hitBy(b, func(r *http.Request, _ []byte) bool {
					return r.Method == http.MethodDelete && r.URL.Path == v.oldJob.Load() &&
						(r.URL.Query().Get("purge") == "true") == (s.point == purged)
				}))
			case tombstoned:
				v.nomad.tell(v.hitBy(b, func(r *http.Request, body []byte) bool {
					return jobSent(r, body) && bytes.Contains(body, []byte(jobs.MetaTombstone))
				}))
			default:
				v.env = append(v.env, fmt.Sprintf("BIVOUAC_FAILPOINT=%s %s %s", b, s.point, v.chat))
			}
			all = append(all, v)
			w.chats = append(w.chats, v.chat)
		}
	}
	return all
}

// hitBy returns a spy that hits the replica when Nomad has carried out a
// request and the replica has not received the answer.
func (v *victim) hitBy(b blow, at moment) spy {
	var once sync.Once
	return func(r *http.Request, body []byte) {
		switch {
		case !at(r, body):
		case b == halt:
			once.Do(func() { _ = v.Pause() }) // if it fails, the test times out
		default:
			_ = v.Signal(syscall.SIGKILL) // it may be dead already
			<-v.Done()
		}
	}
}

// each calls do for all victims at once.
func each(t *testing.T, victims []*victim, do func(context.Context, *victim) error) {
	ctx, cancel := context.WithTimeout(t.Context(), stepLimit)
	defer cancel()
	var all sync.WaitGroup
	for _, v := range victims {
		all.Go(func() {
			if err := do(ctx, v); err != nil {
				t.Errorf("%s, to be hit at %s: %v", v.operation, v.point, err)
			}
		})
	}
	all.Wait()
	must.False(t, t.Failed())
}

// prepare brings the victim's chat into the state before the operation.
func (w *world) prepare(ctx context.Context, survivor *replica, v *victim) error {
	if v.before == fresh {
		return nil
	}
	ttl := time.Hour
	if v.before == expired {
		ttl = scheduler.MinTTL
	}
	res, err := survivor.api.Create(ctx, v.chat, w.load.input("agent-1", ttl))
	if err != nil {
		return err
	}
	v.old = res.Session
	v.oldJob.Store("/v1/job/bivouac-" + v.old.SessionID.String())
	switch v.before {
	case expired:
		pause(ctx, ttl+clockSlack) // by the replicas' agreed time, which may differ from ours
	case ended:
		w.awaitProcess(ctx, v.old.SessionID).signal(syscall.SIGKILL)
	}
	return nil
}

// leaveIntent lets another replica die before it asks Nomad for the sandbox
// whose intent it has just recorded.
func (w *world) leaveIntent(ctx context.Context, t *testing.T, v *victim) error {
	dead := &victim{replica: w.replica(t, "dead-before-"+v.name, "1h"), operation: "create", chat: v.chat}
	dead.env = append(dead.env, fmt.Sprintf("BIVOUAC_FAILPOINT=%s create:before %s", kill, v.chat))
	return errors.Join(dead.start(ctx), w.die(ctx, dead))
}

// begin starts the victim and waits until it knows the state of its chat.
// Starting it before everything is prepared would make it settle what is in
// flight, and it would be hit then.
func begin(ctx context.Context, v *victim) error {
	if err := v.start(ctx); err != nil || v.before != ended {
		return err
	}
	for index := uint64(0); ; {
		found, next, err := v.api.Get(ctx, v.chat, apiclient.Block{Index: index, Wait: time.Second})
		if err != nil || found.Session.State == "dead" {
			return err
		}
		index = next
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

// die lets the victim carry out its operation and waits until it is dead.
func (w *world) die(ctx context.Context, v *victim) error {
	err := v.Signal(0) // check that it runs
	if err != nil {
		return err
	}
	_, err = w.ask(ctx, v)
	if _, answered := errors.AsType[*apiclient.Error](err); err == nil || answered || ctx.Err() != nil {
		return errors.Join(errors.New("it was not killed"), err)
	}
	<-v.Done()
	v.died = time.Now()
	return nil
}

// ask lets the victim carry out its operation. It returns the session in the
// answer.
func (w *world) ask(ctx context.Context, v *victim) (uuid.UUID, error) {
	switch v.operation {
	case "create", "replace", claiming, claimingBad:
		res, err := v.api.Create(ctx, v.chat, w.load.input("agent-1", time.Hour))
		return res.Session.SessionID, err
	case "delete", "delete nothing", settling.name:
		res, err := v.api.Delete(ctx, v.chat)
		return res.SessionID, err
	case "renew":
		session, err := v.api.Renew(ctx, v.chat, 2*time.Hour)
		return session.SessionID, err
	default:
		_, err := v.api.Cleanup(ctx)
		return uuid.Nil, err
	}
}

// unsettled returns what is wrong with the victim's chat, or "".
func (w *world) unsettled(v *victim, records map[uuid.UUID]record, left []string) string {
	if l := v.leftover(records, left); l != "" {
		return l
	}
	has, _ := v.has(records)
	if has != v.then {
		return "the chat has: " + has
	}
	return ""
}

// leftover returns what has not settled in the victim's chat, or "".
func (v *victim) leftover(records map[uuid.UUID]record, left []string) string {
	for _, l := range left {
		if strings.Contains(l, v.chat.String()) || records == nil {
			return l
		}
	}
	return ""
}

// has returns what the victim's chat has, and its session.
func (v *victim) has(records map[uuid.UUID]record) (string, uuid.UUID) {
	for id, r := range records {
		switch {
		case r.ChatID != v.chat:
		case r.State != "running":
			return oldRecord, id
		case id == v.old.SessionID:
			return oldSession, id
		default:
			return newSession, id
		}
	}
	return nothing, uuid.Nil
}

// nameSettlers reads from the replicas' logs who settled what each victim left.
func (w *world) nameSettlers(t *testing.T, victims []*victim) {
	logs, err := filepath.Glob(filepath.Join(w.dir, "*.log"))
	must.NoError(t, err)
	settled, cleaned := make(map[string]string), make(map[string]string) // by chat
	for _, name := range logs {
		text, err := os.ReadFile(name)
		must.NoError(t, err)
		who := strings.TrimSuffix(filepath.Base(name), ".log")
		for line := range strings.Lines(string(text)) {
			_, rest, _ := strings.Cut(line, "chat_id=")
			chat, _, _ := strings.Cut(rest, " ")
			switch {
			case strings.Contains(line, "sandbox_settled: "):
				settled[chat] = who
			case strings.Contains(line, "sandbox_cleaned: "):
				cleaned[chat] = who
			}
		}
	}
	for _, v := range victims {
		switch chat := v.chat.String(); {
		case settled[chat] != "":
			v.by = settled[chat] + ", which finds it in flight"
		case cleaned[chat] != "":
			v.by = cleaned[chat] + ", which cleans up"
		case v.took < sessionTTL: // sooner than any lock expires
			v.by = "nothing was left"
		default:
			v.by = "Consul, which ends the lock"
		}
	}
}

// table formats the result of a test, with the victims' final answers if there
// are any.
func table(victims []*victim) string {
	var b strings.Builder
	out := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(out, "operation\thit at\tthen the chat has\tsettled after\tby\tthen it answers")
	for _, v := range victims {
		_, _ = fmt.Fprintf(out, "%s\t%s\t%s\t%.1f s\t%s\t%s\n", v.operation, v.point, v.then, v.took.Seconds(), v.by, v.answer())
	}
	_ = out.Flush() // it writes to memory
	return b.String()
}

// answer returns the answer to the victim's operation, if any.
func (v *victim) answer() string {
	switch {
	case v.answered == nil:
		return ""
	case v.err != nil:
		return string(codeOf(v.err))
	default:
		return "done"
	}
}
