package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	consul "github.com/hashicorp/consul/api"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// These tests lose, set back or edit records, with the real servers.

// data returns all keys of this Bivouac, except the locks, the replicas and the clock,
// which change by themselves, and the changes, which only a snapshot can set back.
func (w *world) data() map[string]*consul.KVPair {
	w.t.Helper()
	pairs, _, err := w.consul.KV().List(w.prefix, nil)
	must.NoError(w.t, err)
	data := make(map[string]*consul.KVPair)
	for _, pair := range pairs {
		folder, _, _ := strings.Cut(strings.TrimPrefix(pair.Key, w.prefix+"v1/"), "/")
		if !slices.Contains([]string{"locks", "replicas", "events", "clock"}, folder) {
			data[pair.Key] = pair
		}
	}
	return data
}

// setBack restores earlier data, as a restored snapshot does.
func (w *world) setBack(to map[string]*consul.KVPair) {
	w.t.Helper()
	for key := range w.data() {
		if to[key] == nil {
			_, err := w.consul.KV().Delete(key, nil)
			must.NoError(w.t, err)
		}
	}
	for key, pair := range to {
		w.put(key, pair.Value)
	}
}

func TestRecordsThatAreLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	fresh := func() (string, wire.Session) {
		chat := uuid.NewString()
		return chat, r.create(chat, w.body(), http.StatusCreated).Session
	}
	isReused := func(t *testing.T, chat string, session wire.Session) {
		t.Helper()
		again := r.create(chat, w.body(), http.StatusOK)
		must.Eq(t, "reused", again.Result)
		must.Eq(t, session.SessionID, again.Session.SessionID)
		must.Eq(t, session.ContainerID, again.Session.ContainerID)
		must.Eq(t, session.CreatedAt, again.Session.CreatedAt)
		must.False(t, again.Session.ExpiresAt.Before(session.ExpiresAt))
		must.Len(t, 1, w.liveAllocs(chat))
	}

	t.Run("a_snapshot_from_before_the_sessions_gives_no_chat_a_second_sandbox", func(t *testing.T) {
		before := w.data()
		sessions := make(map[string]wire.Session)
		for range 3 {
			chat, session := fresh()
			sessions[chat] = session
		}
		w.setBack(before)
		for chat, session := range sessions {
			isReused(t, chat, session)
			r.delete(chat)
		}
	})

	t.Run("a_snapshot_from_before_a_replacement_finds_the_session_that_runs", func(t *testing.T) {
		chat, first := fresh()
		before := w.data()
		r.delete(chat)
		second := r.create(chat, w.body(), http.StatusCreated).Session
		must.NotEq(t, first.SessionID, second.SessionID)
		w.setBack(before)
		isReused(t, chat, second)
		r.delete(chat)
	})

	t.Run("a_deleted_record_is_found_again_by_a_create", func(t *testing.T) {
		chat, session := fresh()
		_, err := w.consul.KV().Delete(w.recordKey(chat), nil)
		must.NoError(t, err)
		isReused(t, chat, session)
		r.delete(chat)
		must.SliceEmpty(t, processes(t, session))
	})

	t.Run("a_deleted_record_keeps_no_sandbox_from_being_deleted", func(t *testing.T) {
		chat, session := fresh()
		_, err := w.consul.KV().Delete(w.recordKey(chat), nil)
		must.NoError(t, err)
		must.Eq(t, "deleted", r.delete(chat).Result)
		must.SliceEmpty(t, processes(t, session))
	})

	t.Run("an_edited_session_ID_is_healed_by_a_create", func(t *testing.T) {
		chat, session := fresh()
		key := w.recordKey(chat)
		w.put(key, w.edited(key, "session_id", uuid.New()))
		isReused(t, chat, session)
		r.delete(chat)
	})

	t.Run("a_damaged_record_is_repaired", func(t *testing.T) {
		chat, session := fresh()
		key := w.recordKey(chat)
		w.put(key, w.value(key)[:40])
		refused := call[wire.ErrorAnswer](r, http.MethodPut, sessionPath(chat), w.body(), http.StatusInternalServerError)
		must.StrContains(t, refused.Error.Message, "bivouac operator repair")
		repaired := call[wire.RepairAnswer](r, http.MethodPost, "/v1/operator/repair/"+chat, nil, http.StatusOK)
		must.Eq(t, "adopted", repaired.Result)
		isReused(t, chat, session)
		intact := call[wire.RepairAnswer](r, http.MethodPost, "/v1/operator/repair/"+chat, nil, http.StatusOK)
		must.Eq(t, "intact", intact.Result)

		// If there is no sandbox, repair removes the record.
		_, _, err := w.nomad.Jobs().Deregister("bivouac-"+session.SessionID.String(), true, nil)
		must.NoError(t, err)
		eventually(t, "it ended", func() error {
			if pids := processes(t, session); len(pids) > 0 {
				return fmt.Errorf("processes %v", pids)
			}
			return nil
		})
		w.put(key, []byte("{"))
		removed := call[wire.RepairAnswer](r, http.MethodPost, "/v1/operator/repair/"+chat, nil, http.StatusOK)
		must.Eq(t, "removed", removed.Result)
		r.create(chat, w.body(), http.StatusCreated)
		r.delete(chat)
	})
}

// TestSandboxWhoseJobWasPurged shows what happens when Nomad forgets a purged
// job at once although its task takes some time to end.
func TestSandboxWhoseJobWasPurged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	script := `trap 'sleep 4; kill -9 $pid; exit 0' INT TERM; setsid ` + binary + ` demo-sandbox & pid=$!; wait $pid; wait $pid`
	w.flags = append(w.flags, "-job-var=command=/bin/sh", fmt.Sprintf("-job-var=args=[\"-c\", %q]", script))
	r := w.start()
	chat := uuid.NewString()
	first := r.create(chat, w.body(), http.StatusCreated).Session
	began := time.Now()
	_, _, err := w.nomad.Jobs().Deregister("bivouac-"+first.SessionID.String(), true, nil)
	must.NoError(t, err)

	var both int // number of looks at which two sandboxes of the chat ran
	var seen sync.WaitGroup
	done := make(chan struct{})
	stop := sync.OnceFunc(func() {
		close(done)
		seen.Wait()
	})
	t.Cleanup(stop)
	seen.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if len(w.liveAllocs(chat)) > 0 && len(processes(t, first)) > 0 {
				both++
			}
		}
	})
	var next wire.CreateAnswer
	eventually(t, "it is replaced", func() error {
		_, answer, err := r.try(http.MethodPut, sessionPath(chat), w.body())
		if err == nil {
			err = json.Unmarshal(answer, &next)
		}
		if err == nil && next.Result == "reused" {
			err = errors.New("the replica has not heard of the purge, and the sandbox still runs")
		}
		return err
	})
	took := time.Since(began)
	must.SliceEmpty(t, processes(t, first))
	stop()
	must.Eq(t, "replaced", next.Result)
	must.Eq(t, 0, both, must.Sprint("never two alive"))
	must.GreaterEq(t, 3*time.Second, took, must.Sprint("the first one took its time"))
	must.Len(t, 1, w.jobs(), must.Sprint("no tombstone is laid for a sandbox that had started"))
	r.delete(chat)
}

// TestSandboxesWithoutRecordsAreFoundByPasses shows that the leader's passes
// find sandboxes without records even if no caller asks for them.
func TestSandboxesWithoutRecordsAreFoundByPasses(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec", "-ttl=20m")
	r := w.start()
	before := w.data()
	sessions := make(map[string]wire.Session)
	for range 10 {
		chat := uuid.NewString()
		sessions[chat] = r.create(chat, w.body(), http.StatusCreated).Session
	}
	// Three jobs that were made by hand, for no chat, and one that is a second
	// sandbox of a chat.
	one := uuid.NewString()
	kept := r.create(one, w.body(), http.StatusCreated).Session
	keptKey := w.recordKey(one)
	keptValue := w.value(keptKey)
	var foreign []string
	for range 3 {
		foreign = append(foreign, w.copyJob(kept, map[string]string{"chat_id": uuid.Nil.String()}))
	}
	second := w.copyJob(kept, nil)
	w.setBack(before)
	w.put(keptKey, keptValue)

	// Then all records are back and no recorded sandbox has ended.
	must.Wait(t, wait.InitialSuccess(wait.Timeout(4*time.Minute), wait.Gap(time.Second), wait.ErrorFunc(func() error {
		list := call[wire.ListAnswer](r, http.MethodGet, "/v1/sessions", nil, http.StatusOK)
		if len(list.Sessions) != len(sessions)+1 {
			return fmt.Errorf("%d sessions", len(list.Sessions))
		}
		job, _, err := w.nomad.Jobs().Info(second, nil)
		if err == nil && !*job.Stop {
			return errors.New("the second sandbox of a chat runs")
		}
		return nil
	})))
	for chat, session := range sessions {
		found := r.get(chat)
		must.Eq(t, session.SessionID, found.SessionID)
		must.Eq(t, "running", found.State)
		must.SliceNotEmpty(t, processes(t, session))
	}
	must.SliceNotEmpty(t, processes(t, kept))
	health := call[wire.HealthAnswer](r, http.MethodGet, "/v1/agent/health", nil, http.StatusOK)
	must.StrContains(t, health.Checks["sessions"].Error, "Bivouac did not make this sandbox")
	t.Logf("health: %s", health.Checks["sessions"].Error)

	for _, id := range foreign {
		job, _, err := w.nomad.Jobs().Info(id, nil)
		must.NoError(t, err)
		must.False(t, *job.Stop)
		_, _, err = w.nomad.Jobs().Deregister(id, true, nil)
		must.NoError(t, err)
	}
	for chat := range sessions {
		r.delete(chat)
	}
	r.delete(one)
}

// copyJob registers a session's job again with another session ID and changed
// meta, and returns the copy's job ID when it runs.
func (w *world) copyJob(session wire.Session, meta map[string]string) string {
	w.t.Helper()
	job, _, err := w.nomad.Jobs().Info("bivouac-"+session.SessionID.String(), nil)
	must.NoError(w.t, err)
	id := uuid.NewString()
	job.ID, job.Name = new("bivouac-"+id), new("bivouac-"+id)
	job.Meta["session_id"] = id
	maps.Copy(job.Meta, meta)
	job.Version, job.CreateIndex, job.ModifyIndex, job.JobModifyIndex = nil, nil, nil, nil
	_, _, err = w.nomad.Jobs().Register(job, nil)
	must.NoError(w.t, err)
	eventually(w.t, "the copy runs", func() error {
		allocs, _, err := w.nomad.Jobs().Allocations(*job.ID, false, nil)
		if err == nil && (len(allocs) == 0 || allocs[0].ClientStatus != nomad.AllocClientStatusRunning) {
			err = errors.New("not yet")
		}
		return err
	})
	return *job.ID
}
