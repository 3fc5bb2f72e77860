package main

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/apiclient"
)

// A client of Nomad stops sandboxes when it has heard nothing of its servers for a
// while. The pauses between its heartbeats are not such a while.
func TestSandboxOutlivesHeartbeats(t *testing.T) {
	// Given a sandbox, and nothing that goes on beside it.
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
	must.Eq(t, created.Session, found)
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
