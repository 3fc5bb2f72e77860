package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/stack"
)

func testWorld(t *testing.T) *world { return testWorldOn(t, stack.NomadForTest(t)) }

// testWorldOn returns a world that uses the given Nomad.
func testWorldOn(t *testing.T, nomad *stack.Nomad) *world {
	dir := t.TempDir()
	log, err := newTimeline(dir)
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, log.close()) })
	consul, _ := stack.ConsulForTest(t)
	w := &world{plan: plan{binary: filepath.Join(dir, "bivouac")}, dir: dir, log: log, told: newLedger(log), stopped: func() {}}
	w.kv, err = consul.Client()
	must.NoError(t, err)
	w.jobs, err = nomad.Client()
	must.NoError(t, err)
	w.load = &load{volume: dir, log: log, told: w.told}
	must.NoError(t, stack.BuildBivouac(t.Context(), w.plan.binary, "failpoints"))
	return w
}

// replica creates a replica but does not start it.
func (w *world) replica(t *testing.T, name, cleanup string, more ...string) *replica {
	consul, err := newProxy([]string{strings.TrimPrefix(w.consulAddr(t), "http://")}, 0)
	must.NoError(t, err)
	nomad, err := newProxy([]string{strings.TrimPrefix(w.jobs.Address(), "http://")}, 0)
	must.NoError(t, err)
	r, err := newReplica(w.dir, name, w.plan.binary, consul, nomad, append(flags(cleanup), more...))
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, r.close()) })
	return r
}

func (w *world) consulAddr(t *testing.T) string {
	c, _ := stack.ConsulForTest(t)
	return c.Addr()
}

// createsOne checks that a create for the victim's chat returns a sandbox that
// answers. It deletes the session and returns its ID.
func (w *world) createsOne(t *testing.T, survivor *replica, v *victim) uuid.UUID {
	res, err := survivor.api.Create(t.Context(), v.chat, w.load.input("agent-1", time.Hour))
	must.NoError(t, err)
	must.NoError(t, w.load.knock(res.Session))
	_, err = survivor.api.Delete(t.Context(), v.chat)
	must.NoError(t, err)
	return res.Session.SessionID
}

func (w *world) survivor(t *testing.T, name, cleanup string) *replica {
	r := w.replica(t, name, cleanup)
	must.NoError(t, r.start(t.Context()))
	return r
}
