package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
)

// TestCrowdOverFiveReplicasGetsOneSandbox shows that many callers who want the
// sandbox of one chat at once, from several replicas, all get the same single
// sandbox.
func TestCrowdOverFiveReplicasGetsOneSandbox(t *testing.T) {
	const callers, crowded = 500, 5
	w := testWorld(t)
	chat := uuid.New()
	w.chats = []uuid.UUID{chat}
	w.census = newCensus(w.chats, w.log, w.told)
	w.watch(t.Context())
	t.Cleanup(w.halt)
	for i := range crowded {
		w.replicas = append(w.replicas, w.survivor(t, fmt.Sprintf("replica-%d", i), "1h"))
	}

	limit, enough := context.WithTimeout(t.Context(), 3*time.Minute)
	defer enough()
	var all sync.WaitGroup
	var served atomic.Int32
	for i := range callers {
		all.Go(func() {
			try := func(r *replica) error {
				return w.load.create(limit, r, chat, w.load.input("agent-1", time.Hour), time.Minute)
			}
			err := try(w.replicas[i%crowded])
			for worthAnother(err) && limit.Err() == nil { // it was told to try again
				pause(limit, time.Second)
				err = try(w.replicas[i%crowded])
			}
			if err == nil {
				served.Add(1)
			}
		})
	}
	all.Wait()

	must.Eq(t, callers, served.Load())
	must.Eq(t, 1, w.load.made.Load())
	must.Eq(t, 1, w.census.total())
	w.told.judge()
	must.Eq(t, 0, w.log.violations(), must.Sprint(w.log.worst()))
	_, err := w.replicas[0].api.Delete(t.Context(), chat)
	must.NoError(t, err)
}
