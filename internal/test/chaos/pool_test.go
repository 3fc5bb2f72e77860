package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/test/stack"
)

// These operations are on a pool, or take a spare of it.
const (
	filling     = "fill"        // the victim leads, and the pool is empty
	ending      = "end a spare" // the victim leads, and a spare dies
	claiming    = "claim"       // the victim creates a session from a spare
	claimingBad = "claim a spare that has died"
)

// poolOperations are the operations on a pool, with the steps at which a replica is
// killed and what the chat of the victim has then. Those of an entry are killed beside
// each other, with one survivor and one pool. Only one replica leads, so each victim that
// leads is alone.
var poolOperations = []operation{
	{filling, fresh, []step{{"spare-starting:before", nothing}}},
	{filling, fresh, []step{{"spare-starting:after", nothing}}},
	{filling, fresh, []step{{registered, nothing}}},
	{filling, fresh, []step{{"create:placed", nothing}}},
	{filling, fresh, []step{{"create:ready", nothing}}},
	{filling, fresh, []step{{"create:after", nothing}}},
	{filling, fresh, []step{{"spare-ready:after", nothing}}},

	{ending, fresh, []step{{"spare-ending:before", nothing}}},
	{ending, fresh, []step{{"spare-ending:after", nothing}}},
	{ending, fresh, []step{{deregistered, nothing}}},
	{ending, fresh, []step{{"delete:after", nothing}}},
	{ending, fresh, []step{{"spare-remove:after", nothing}}},

	{claiming, fresh, []step{
		{"write-claim:before", nothing}, {"write-claim:after", nothing},
		{"claim:after", nothing}, {"write-running:after", newSession},
	}},
	{claimingBad, fresh, []step{
		{"delete:before", nothing}, {"delete:after", nothing},
		{"write-expiry:after", nothing}, {"create:ready", nothing}, // a start without a spare
	}},
}

const (
	// poolCasesAtOnce is how many entries of poolOperations there are at a time. More would
	// measure the machine.
	poolCasesAtOnce = 2

	// poolTries is how often an entry is tried at most. On a machine that is very busy a
	// claim may take longer than its limit, and the step at which a victim is killed does
	// not come.
	poolTries = 3
)

// errNotKilled is returned if the step at which a victim is killed did not come.
var errNotKilled = errors.New("it was not killed")

// poolCase is an operation on a pool of its own, with a prefix of its own in Consul: the
// replicas that are killed, and the one that settles what they leave.
type poolCase struct {
	operation
	victims  []*victim
	survivor *replica
	prefix   string
	size     int       // of the pool
	from     time.Time // when the victims were dead and the survivor had been started, or before
}

// TestReplicaKilledAtEachStepOfAPoolIsSettledByOthers shows that a replica that is
// killed while it fills a pool or claims a spare leaves no sandbox behind, and that the
// other replica fills the pool again. The test prints how long that took, and fails only
// if it took far longer than promised: how fast it is depends on the machine.
func TestReplicaKilledAtEachStepOfAPoolIsSettledByOthers(t *testing.T) {
	w, helpers := poolWorld(t)
	// Given replicas with a pool that is full or being filled, when some of them are
	// killed, then another one settles what they left and fills the pool, and the next
	// create gets a spare.
	cases := make([][]*poolCase, len(poolOperations)) // with all tries
	places := make(chan struct{}, poolCasesAtOnce)
	t.Run("each", func(t *testing.T) {
		for i, op := range poolOperations {
			t.Run(fmt.Sprintf("%s killed at %s", op.name, op.points()), func(t *testing.T) {
				t.Parallel()
				places <- struct{}{}
				defer func() { <-places }()
				var err error
				for try := range poolTries {
					c := w.newPoolCase(t, fmt.Sprintf("pool-%d-%d", i, try), op, helpers)
					cases[i] = append(cases[i], c)
					if err = w.settledByOther(t.Context(), c); !errors.Is(err, errNotKilled) {
						break
					}
					t.Logf("try %d: %v", try, err)
				}
				must.NoError(t, err)
			})
		}
	})
	var dead []*victim
	within := 0
	for _, tries := range cases {
		if len(tries) == 0 {
			continue // the test has failed
		}
		for _, v := range tries[len(tries)-1].victims {
			dead = append(dead, v)
			if !v.from.IsZero() && v.left == "" && v.took <= settleLimit {
				within++
			}
		}
	}
	t.Logf("\n%s%d of %d were settled within %s.", table(dead), within, len(dead), settleLimit)

	// And no sandbox runs that is neither a session's nor a recorded spare's.
	must.SliceEmpty(t, w.awaitNoStrays(t, slices.Concat(cases...)))
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}

// poolWorld returns a world with a Nomad of its own, whose node has a helper.
func poolWorld(t *testing.T) (*world, *stack.Helpers) {
	stack.NeedServers(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, as a node helper does")
	}
	nomad, err := stack.StartNomad(t.Context(), stack.NomadConfig{Drivers: []string{"raw_exec"}, MaxHTTPConns: manyConns})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, nomad.Stop()) })
	w := testWorldOn(t, nomad)
	w.load.volume = filepath.Join(w.dir, "volume") // a helper binds only what is below its root
	must.NoError(t, os.Mkdir(w.load.volume, 0o755))
	helpers, err := stack.StartHelpers(t.Context(), nomad, w.plan.binary, w.dir)
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, helpers.Stop()) })
	w.census = newCensus(nil, w.log, w.told)
	w.census.nomad = filepath.Dir(nomad.VolumeDir)
	w.watch(t.Context())
	t.Cleanup(w.halt)
	return w, helpers
}

// points returns the steps of an operation, for the name of a test.
func (o operation) points() string {
	var all []string
	for _, s := range o.steps {
		all = append(all, s.point)
	}
	return strings.Join(all, ", ")
}

// newPoolCase creates the replicas of a case, but does not start them.
func (w *world) newPoolCase(t *testing.T, name string, op operation, helpers *stack.Helpers) *poolCase {
	c := &poolCase{operation: op, prefix: name + "/", size: max(2, len(op.steps))}
	set := newPools(helpers.Config)
	set.now.size = c.size
	replica := func(suffix string) *replica {
		file := filepath.Join(w.dir, name+suffix+"-pool.hcl")
		r := w.replica(t, name+suffix, "1h", "-kv-prefix="+c.prefix, "-instance="+name, "-config="+file)
		r.pools, r.file = set, file
		return r
	}
	c.survivor = replica("-survivor")
	for i, s := range op.steps {
		v := &victim{replica: replica(fmt.Sprintf("-victim-%d", i)), operation: op.name, before: op.before, step: s, chat: uuid.New()}
		switch s.point {
		case registered:
			v.nomad.tell(v.hitBy(kill, func(r *http.Request, body []byte) bool {
				return jobSent(r, body) && bytes.Contains(body, []byte(poolName))
			}))
		case deregistered:
			v.nomad.tell(v.hitBy(kill, func(r *http.Request, _ []byte) bool {
				return r.Method == http.MethodDelete && r.URL.Path == v.oldJob.Load()
			}))
		default:
			of := v.chat.String()
			// A spare has no chat, also while its claim is being undone.
			if op.name == filling || op.name == ending || strings.HasPrefix(s.point, "delete:") {
				of = poolName
			}
			v.env = append(v.env, fmt.Sprintf("BIVOUAC_FAILPOINT=%s %s %s", kill, s.point, of))
		}
		c.victims = append(c.victims, v)
	}
	return c
}

// settledByOther lets the victims die, waits until the survivor has settled what they left,
// and stops the survivor. Its spares remain.
func (w *world) settledByOther(ctx context.Context, c *poolCase) (err error) {
	defer func() {
		for _, v := range c.victims {
			err = errors.Join(err, v.Stop()) // one that was not killed
		}
		err = errors.Join(err, c.survivor.Stop())
	}()
	limit, enough := context.WithTimeout(ctx, patience)
	defer enough()
	if err := w.dieWithPool(limit, c); err != nil {
		return err
	}
	w.awaitCase(ctx, c)
	for _, v := range c.victims {
		if v.left != "" {
			return fmt.Errorf("%s: after %s: %s", v.point, v.took.Round(time.Second), v.left)
		}
	}
	for _, v := range c.victims {
		if err := w.createsWarm(ctx, c, v); err != nil {
			return fmt.Errorf("%s: %w", v.point, err)
		}
	}
	return nil
}

// dieWithPool lets the victims carry out their operation and waits until they are dead.
func (w *world) dieWithPool(ctx context.Context, c *poolCase) error {
	switch c.name {
	case filling:
		if err := w.startVictimFirst(ctx, c); err != nil {
			return err
		}
	case ending:
		if err := errors.Join(w.startVictimFirst(ctx, c), w.killSpares(ctx, c, 1)); err != nil {
			return err
		}
	case claiming:
		if err := w.startSurvivorFirst(ctx, c); err != nil {
			return err
		}
		return c.die(ctx, w)
	case claimingBad:
		// The leader must not notice before the claims that the spares have died.
		if err := errors.Join(w.startSurvivorFirst(ctx, c), c.survivor.Pause()); err != nil {
			return err
		}
		return errors.Join(w.killSpares(ctx, c, c.size), c.die(ctx, w), c.survivor.Resume())
	}
	v := c.victims[0]
	if v.Running() { // it was not killed while the survivor started
		c.from = time.Time{}
	}
	select {
	case <-v.Done():
		return nil
	case <-ctx.Done():
		return errNotKilled
	}
}

// die lets all victims carry out their operation and waits until they are dead.
func (c *poolCase) die(ctx context.Context, w *world) error {
	var all errgroup.Group
	for _, v := range c.victims {
		all.Go(func() error {
			if err := w.die(ctx, v); err != nil {
				return fmt.Errorf("%w at %s: %w", errNotKilled, v.point, err)
			}
			return nil
		})
	}
	return all.Wait()
}

// startVictimFirst starts the replicas so that the victim leads.
func (w *world) startVictimFirst(ctx context.Context, c *poolCase) error {
	v := c.victims[0]
	config, err := v.pools.write(v.file)
	if err != nil {
		return err
	}
	v.pooling, v.Env = config, v.env
	if err := v.Start(); err != nil { // it may be dead before it is ready
		return err
	}
	if err := w.awaitLeader(ctx, c, v.replica); err != nil {
		return err
	}
	c.from = time.Now()
	return c.survivor.start(ctx)
}

// awaitLeader waits until the only replica that runs leads, or is dead.
func (w *world) awaitLeader(ctx context.Context, c *poolCase, r *replica) error {
	opts := (&consulapi.QueryOptions{}).WithContext(ctx)
	for led := false; !led && r.Running(); pause(ctx, 50*time.Millisecond) {
		pairs, _, err := w.kv.KV().List(c.prefix+"v1/locks/", opts)
		if err != nil {
			return err
		}
		led = slices.ContainsFunc(pairs, func(p *consulapi.KVPair) bool {
			return strings.HasSuffix(p.Key, uuid.Nil.String()) && p.Session != ""
		})
	}
	return nil
}

// startSurvivorFirst starts the replicas so that the survivor leads, and waits until the
// victims know that the pool is full.
func (w *world) startSurvivorFirst(ctx context.Context, c *poolCase) error {
	if err := errors.Join(c.survivor.start(ctx), w.awaitLeader(ctx, c, c.survivor)); err != nil {
		return err
	}
	full := fmt.Sprintf("sandbox_pool_ready{pool=%q} %d\n", poolName, c.size)
	var all errgroup.Group
	for _, v := range c.victims {
		all.Go(func() error {
			if err := v.start(ctx); err != nil {
				return err
			}
			for ; ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
				if text, err := v.metrics(ctx); err != nil || strings.Contains(text, full) {
					return err
				}
			}
			return errors.New("its pool was not filled")
		})
	}
	return all.Wait()
}

// killSpares waits until the pool is full and kills the processes of n spares.
func (w *world) killSpares(ctx context.Context, c *poolCase, n int) error {
	for ; ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
		now, err := w.readPool(ctx, c)
		if err != nil {
			return err
		}
		ready := now.ready()
		if len(ready) < c.size {
			continue
		}
		for _, v := range c.victims {
			v.oldJob.Store("/v1/job/bivouac-" + ready[0].String())
		}
		for _, id := range ready[:n] {
			w.awaitProcess(ctx, id).signal(syscall.SIGKILL)
		}
		return ctx.Err()
	}
	return errors.New("its pool was not filled")
}

// ready returns the sessions of spares that are ready.
func (s stored) ready() (all []uuid.UUID) {
	for id, spare := range s.spares {
		if spare.State == "ready" {
			all = append(all, id)
		}
	}
	return all
}

// has reports whether a record or a spare names a session.
func (s stored) has(id uuid.UUID) bool {
	_, record := s.records[id]
	_, spare := s.spares[id]
	return record || spare
}

// readPool reads the keys of a case.
func (w *world) readPool(ctx context.Context, c *poolCase) (stored, error) {
	s, err := w.readStore(ctx, c.prefix)
	return s, errors.Join(append(s.damaged, err)...)
}

// awaitCase waits until what the victims left is settled and the pool is full again, or
// until patience has passed.
func (w *world) awaitCase(ctx context.Context, c *poolCase) {
	if c.from.IsZero() {
		c.from = time.Now()
	}
	for _, v := range c.victims {
		v.from, v.left = c.from, "not looked at"
	}
	for done := false; !done && time.Since(c.from) <= patience && ctx.Err() == nil; pause(ctx, 100*time.Millisecond) {
		running := w.census.running() // first: a spare is recorded before it runs
		p, err := w.readPool(ctx, c)
		var wrong string
		if err != nil {
			wrong = err.Error()
		} else {
			wrong = w.poolUnsettled(ctx, c, p, running)
		}
		done = true
		for _, v := range c.victims {
			if v.left == "" {
				continue
			}
			v.took, v.left = time.Since(c.from), wrong
			if has, _ := v.has(p.records); wrong == "" && has != v.then {
				v.left = "the chat has: " + has
			}
			if left := v.leftover(p.records, p.left); left != "" {
				v.left = left
			}
			v.by = "the other replica"
			done = done && v.left == ""
		}
	}
}

// poolUnsettled returns what is wrong with the pool of a case, or "".
func (w *world) poolUnsettled(ctx context.Context, c *poolCase, p stored, running map[uuid.UUID]*sandbox) string {
	if len(p.spares) != c.size || len(p.ready()) != c.size {
		return fmt.Sprintf("the pool has %d spares, and %d are ready", len(p.spares), len(p.ready()))
	}
	for _, id := range p.ready() {
		if running[id] == nil {
			return "spare without a process: " + id.String()
		}
	}
	list, err := w.jobsWithMeta(ctx)
	if err != nil {
		return err.Error()
	}
	for _, job := range list {
		id, err := uuid.Parse(job.Meta["session_id"])
		switch {
		case job.Meta["bivouac_instance"] != p.instance || err == nil && p.has(id):
		case running[id] != nil:
			return "process that no record names: " + id.String()
		case !job.Stop && job.Status != "dead":
			return fmt.Sprintf("job that no record names: %s is %s", job.ID, job.Status)
		}
	}
	return ""
}

// createsWarm checks that a create gives the victim's chat a spare, or the session from a
// spare that the chat has. It then deletes the session. On a machine that is very busy a
// claim may take longer than its limit, so that the create starts a sandbox. Then it waits
// until the pool is full, and tries again.
func (w *world) createsWarm(ctx context.Context, c *poolCase, v *victim) error {
	limit, enough := context.WithTimeout(ctx, patience)
	defer enough()
	for tries := 1; ; tries++ {
		res, err := c.survivor.api.Create(limit, v.chat, w.load.input("agent-1", time.Hour))
		if err != nil {
			return fmt.Errorf("create %d: %w", tries, err)
		}
		if reused := res.Result == "reused"; tries == 1 && reused != (v.then == newSession) {
			return fmt.Errorf("the create is answered: %s", res.Result)
		}
		if err := w.load.knock(res.Session); err != nil {
			return err
		}
		if _, err := c.survivor.api.Delete(limit, v.chat); err != nil {
			return err
		}
		if res.Session.Warm {
			return nil
		}
		w.log.note("create %d of chat %s is cold", tries, v.chat)
		for full := false; !full; pause(limit, 100*time.Millisecond) {
			p, err := w.readPool(limit, c)
			if err != nil {
				return fmt.Errorf("no create of %d got a spare: %w", tries, err)
			}
			full = len(p.ready()) == c.size
		}
	}
}

// awaitNoStrays returns the sandboxes of this test's Nomad that no record names, once
// there are none or patience has passed.
func (w *world) awaitNoStrays(t *testing.T, cases []*poolCase) (strays []string) {
	limit, enough := context.WithTimeout(t.Context(), patience)
	defer enough()
	for first := true; first || len(strays) > 0 && limit.Err() == nil; pause(limit, 100*time.Millisecond) {
		first, strays = false, nil
		running := w.census.running()
		for _, c := range cases {
			p, err := w.readPool(t.Context(), c)
			must.NoError(t, err)
			maps.DeleteFunc(running, func(id uuid.UUID, _ *sandbox) bool { return p.has(id) })
		}
		for id, s := range running {
			strays = append(strays, fmt.Sprintf("session %s chat %s pids %v", id, s.chat, s.pids))
		}
	}
	return strays
}
