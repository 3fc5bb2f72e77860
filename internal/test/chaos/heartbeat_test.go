package main

import (
	"bytes"
	"context"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// These are the settings in the job for when a node without its servers stops
// its sandboxes.
var (
	stopAfterMinutes = []byte(`"StopOnClientAfter":300000000000`)
	stopAfterSeconds = []byte(`"StopOnClientAfter":10000000000`)
)

// TestSandboxOutlivesHeartbeats shows that a Nomad client does not stop
// sandboxes during the normal pauses between heartbeats. It does so only when
// it has heard nothing from its servers for a while.
func TestSandboxOutlivesHeartbeats(t *testing.T) {
	// Given a sandbox and nothing else that runs.
	w := testWorld(t)
	r := w.survivor(t, "replica", "1h")
	created, err := r.api.Create(t.Context(), uuid.New(), w.load.input("agent-1", time.Hour))
	must.NoError(t, err)

	// When the client has sent two heartbeats,
	var beats int
	for last := w.sinceHeartbeat(t); beats < 2; pause(t.Context(), 100*time.Millisecond) {
		now := w.sinceHeartbeat(t)
		if now < last {
			beats++
		}
		last = now
	}

	// then it still runs.
	must.NoError(t, w.load.knock(created.Session))
	found, _, err := r.api.Get(t.Context(), created.Session.ChatID, apiclient.Block{})
	must.NoError(t, err)
	must.Eq(t, created.Session, found.Session)
	_, err = r.api.Delete(t.Context(), created.Session.ChatID)
	must.NoError(t, err)
}

func (w *world) sinceHeartbeat(t *testing.T) time.Duration {
	self, err := w.jobs.Agent().Self()
	must.NoError(t, err)
	since, err := time.ParseDuration(self.Stats["client"]["last_heartbeat"])
	must.NoError(t, err)
	return since
}

// TestSandboxOfNodeThatIsCutOffForLongIsEndedAndNotReplaced shows that a node
// that hears nothing from Nomad's servers ends its sandbox. Nothing replaces
// the sandbox, and Bivouac reports its end once the servers hear from the node
// again.
func TestSandboxOfNodeThatIsCutOffForLongIsEndedAndNotReplaced(t *testing.T) {
	// Given a sandbox that its node ends after seconds instead of minutes.
	stack.NeedServers(t)
	nomad, err := stack.StartNomad(t.Context(), stack.NomadConfig{
		Servers: 1, Clients: 2, Drivers: []string{"raw_exec"},
		HeartbeatGrace: heartbeatGrace, MinHeartbeatTTL: heartbeat,
	})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, nomad.Stop()) })
	w := testWorldOn(t, nomad)
	chat := uuid.New()
	w.census = newCensus([]uuid.UUID{chat}, w.log, w.told)
	w.watch(t.Context())
	t.Cleanup(w.halt)
	r := w.replica(t, "replica", "1h")
	var shortened atomic.Int32
	r.nomad.change(func(r *http.Request, body []byte) []byte {
		short := bytes.Replace(body, stopAfterMinutes, stopAfterSeconds, 1)
		if !bytes.Equal(short, body) {
			shortened.Add(1)
		}
		return short
	})
	must.NoError(t, r.start(t.Context()))
	created, err := r.api.Create(t.Context(), chat, w.load.input("agent-1", time.Hour))
	must.NoError(t, err)
	must.Positive(t, shortened.Load()) // the health check sends a job, too
	id := created.Session.SessionID
	sandbox := w.awaitProcess(t.Context(), id)

	// When the nodes hear nothing from their server for longer than that,
	must.NoError(t, nomad.Servers[0].Pause())
	limit, enough := context.WithTimeout(t.Context(), time.Minute)
	defer enough()
	for w.census.running()[id] != nil && limit.Err() == nil {
		pause(limit, scanEvery)
	}
	// then the node ends it,
	must.NoError(t, limit.Err())
	must.False(t, slices.ContainsFunc(sandbox.pids, isAlive))
	must.NoError(t, nomad.Servers[0].Resume())
	must.NoError(t, nomad.Servers[0].WaitReady(t.Context()))

	// Bivouac reports that,
	limit, enough = context.WithTimeout(t.Context(), settleLimit)
	defer enough()
	for state := ""; state != "dead"; pause(limit, scanEvery) {
		found, _, err := r.api.Get(limit, chat, apiclient.Block{})
		must.NoError(t, limit.Err())
		if err == nil {
			must.SliceContains(t, []string{"running", "lost", "dead"}, found.Session.State)
			state = found.Session.State
		}
	}
	// nothing has replaced it, which Nomad would have decided when it reported
	// the end,
	must.MapEmpty(t, w.census.running())
	must.Eq(t, 1, w.census.total())
	// and a create makes a new sandbox.
	again, err := r.api.Create(t.Context(), chat, w.load.input("agent-1", time.Hour))
	must.NoError(t, err)
	must.Eq(t, "replaced", again.Result)
	must.NoError(t, w.load.knock(again.Session))
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
}
