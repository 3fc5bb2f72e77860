package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	consul "github.com/hashicorp/consul/api"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// recordKey returns the key of the chat's record.
func (w *world) recordKey(chat string) string {
	w.t.Helper()
	keys := w.keys(chat)
	i := slices.IndexFunc(keys, func(key string) bool { return strings.Contains(key, "/sessions/") })
	must.NonNegative(w.t, i, must.Sprintf("the record's key is among %q", keys))
	return keys[i]
}

func (w *world) value(key string) []byte {
	w.t.Helper()
	pair, _, err := w.consul.KV().Get(key, nil)
	must.NoError(w.t, err)
	must.NotNil(w.t, pair)
	return pair.Value
}

func (w *world) put(key string, value []byte) {
	w.t.Helper()
	_, err := w.consul.KV().Put(&consul.KVPair{Key: key, Value: value}, nil)
	must.NoError(w.t, err)
}

// edited returns the record at key with one field changed.
func (w *world) edited(key, field string, value any) []byte {
	w.t.Helper()
	var fields map[string]any
	must.NoError(w.t, json.Unmarshal(w.value(key), &fields))
	fields[field] = value
	text, err := json.Marshal(fields)
	must.NoError(w.t, err)
	return text
}

func TestDamagedRecordsAreReportedAndLeftAlone(t *testing.T) {
	t.Parallel()
	// Given sessions whose records are damaged, each in a different way.
	w := newWorld(t, "raw_exec")
	r := w.start()
	neighbour := r.create(uuid.NewString(), w.body(), http.StatusCreated).Session
	neighbourKey := w.recordKey(neighbour.ChatID.String())
	type damage struct {
		chat, key string
		session   wire.Session
		whole     []byte
		reason    string
	}
	var damages []damage
	for reason, spoil := range map[string]func(key string) []byte{
		"unexpected end":     func(key string) []byte { return w.value(key)[:40] },
		"record version 0":   func(key string) []byte { return w.edited(key, "v", 0) },
		"holds chat":         func(string) []byte { return w.value(neighbourKey) },
		"session_id missing": func(key string) []byte { return w.edited(key, "session_id", uuid.Nil) },
		"invalid UUID":       func(key string) []byte { return w.edited(key, "session_id", "x") },
	} {
		d := damage{chat: uuid.NewString(), reason: reason}
		d.session = r.create(d.chat, w.body(), http.StatusCreated).Session
		d.key = w.recordKey(d.chat)
		d.whole = w.value(d.key)
		w.put(d.key, spoil(d.key))
		damages = append(damages, d)
	}
	// A record that names another chat's session is well-formed.
	thief := damage{chat: uuid.NewString(), reason: "another's session"}
	thief.session = r.create(thief.chat, w.body(), http.StatusCreated).Session
	thief.key = w.recordKey(thief.chat)
	thief.whole = w.value(thief.key)
	w.put(thief.key, w.edited(thief.key, "session_id", neighbour.SessionID))

	// Then requests for such a chat get the error, and the log names the record
	// and the reason.
	for _, d := range damages {
		for _, method := range []string{http.MethodPut, http.MethodDelete, http.MethodGet} {
			var body any
			if method == http.MethodPut {
				body = w.body()
			}
			refused := call[wire.ErrorAnswer](r, method, sessionPath(d.chat), body, http.StatusInternalServerError)
			must.Eq(t, wire.CodeDamagedRecord, refused.Error.Code)
			r.hasLogged(refused.Error.RequestID, d.chat, d.reason)
		}
	}

	// And a chat whose record names another chat's session finds its own
	// sandbox again.
	must.Eq(t, "lost", r.get(thief.chat).State)
	found := r.create(thief.chat, w.body(), http.StatusOK)
	must.Eq(t, "reused", found.Result)
	must.Eq(t, thief.session.SessionID, found.Session.SessionID)

	// And the other chats are served as before: one expires, one is listed.
	short := w.body()
	short.TTL = "5s"
	expires := uuid.NewString()
	r.create(expires, short, http.StatusCreated)
	eventually(t, "the expired session is cleaned up", func() error {
		if keys := w.keys(expires); len(keys) > 0 {
			return fmt.Errorf("keys %q", keys)
		}
		return nil
	})
	list := call[wire.ListAnswer](r, http.MethodGet, "/v1/sessions", nil, http.StatusOK)
	must.Len(t, 2, list.Sessions, must.Sprint("the neighbour's and the thief's"))
	for _, d := range damages {
		r.hasLogged("record_skipped", d.key, d.reason)
	}

	// And no sandbox was stopped, not even by another replica.
	w.start()
	for _, d := range append(damages, thief, damage{session: neighbour}) {
		must.SliceNotEmpty(t, processes(t, d.session), must.Sprint(d.reason))
	}

	// When the records are restored, everything is as before.
	for _, d := range append(damages, thief) {
		w.put(d.key, d.whole)
		must.Eq(t, d.session, r.create(d.chat, w.body(), http.StatusOK).Session)
		must.Eq(t, "deleted", r.delete(d.chat).Result)
		must.SliceEmpty(t, w.keys(d.chat))
	}
	r.delete(neighbour.ChatID.String())
	must.SliceEmpty(t, processes(t, neighbour))
}

func TestRecordThatWasEditedToAnotherContainerIsReplaced(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	chat := uuid.NewString()
	first := r.create(chat, w.body(), http.StatusCreated).Session
	key := w.recordKey(chat)
	w.put(key, w.edited(key, "container_id", uuid.NewString()))

	seen := r.get(chat)
	must.Eq(t, "lost", seen.State)
	must.StrContains(t, seen.Reason, first.ContainerID)
	next := r.create(chat, w.body(), http.StatusCreated)
	must.Eq(t, "replaced", next.Result)
	must.SliceEmpty(t, processes(t, first))
	must.Len(t, 1, w.liveAllocs(chat))
	r.delete(chat)
}

func TestIndexKeysWithoutARecordAreRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	absent := uuid.NewString()
	root := w.prefix + "v1/"
	for _, key := range []string{
		root + "flight/" + absent,
		root + "expiry/" + time.Now().UTC().Format("200601021504") + "/" + absent,
	} {
		w.put(key, []byte("?"))
		r.hasLogged("index_entry_removed", key)
	}
	eventually(t, "they are gone", func() error {
		if keys := w.keys(absent); len(keys) > 0 {
			return fmt.Errorf("keys %q", keys)
		}
		return nil
	})
}

func TestJobsOfOthersAreLeftAlone(t *testing.T) {
	t.Parallel()
	// Given a job with Bivouac's prefix but without the meta of any Bivouac.
	w := newWorld(t, "raw_exec")
	job := nomad.NewBatchJob("bivouac-"+uuid.NewString(), "somebody's", "global", 50)
	task := nomad.NewTask("main", "raw_exec")
	task.Config = map[string]any{"command": "/bin/sleep", "args": []string{"600"}}
	job.AddTaskGroup(nomad.NewTaskGroup("main", 1).AddTask(task))
	job.Datacenters = []string{"*"}
	_, _, err := w.nomad.Jobs().Register(job, nil)
	must.NoError(t, err)
	t.Cleanup(func() {
		_, _, err := w.nomad.Jobs().Deregister(*job.ID, true, nil)
		must.NoError(t, err)
	})

	// Then a replica logs it, works as usual and leaves it running.
	r := w.start()
	r.hasLogged("nomad_job_skipped", *job.ID)
	chat := uuid.NewString()
	r.create(chat, w.body(), http.StatusCreated)
	r.delete(chat)
	standing, _, err := w.nomad.Jobs().Info(*job.ID, nil)
	must.NoError(t, err)
	must.False(t, *standing.Stop)
}

func TestLockKeyDeletedInMidCreate(t *testing.T) {
	t.Parallel()
	// Given a create that takes long, and an operator who deletes its lock key.
	w := newWorld(t, "raw_exec")
	w.flags = append(w.flags, "-job-var=command=/bin/sleep", `-job-var=args=["300"]`)
	first, second := w.start(), w.start()
	chat := uuid.NewString()
	answered := make(chan error, 1)
	go func() {
		status, text, err := first.try(http.MethodPut, sessionPath(chat), w.body())
		if err == nil && status != http.StatusServiceUnavailable {
			err = fmt.Errorf("status %d: %s", status, text)
		}
		answered <- err
	}()
	eventually(t, "the sandbox runs", func() error {
		if len(w.liveAllocs(chat)) == 0 {
			return errors.New("no allocation yet")
		}
		return nil
	})
	for _, key := range w.keys(chat) {
		if strings.Contains(key, "/locks/") {
			_, err := w.consul.KV().Delete(key, nil)
			must.NoError(t, err)
		}
	}

	// When another replica takes over the chat, the start is undone, the first
	// caller gets an error, and nothing is left.
	status, text, err := second.try(http.MethodDelete, sessionPath(chat), nil)
	must.NoError(t, err)
	must.Eq(t, http.StatusOK, status, must.Sprint(string(text)))
	must.NoError(t, <-answered)
	must.SliceEmpty(t, w.liveAllocs(chat))
	must.SliceEmpty(t, w.keys(chat))
}
