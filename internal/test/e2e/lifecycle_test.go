package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// eachTemplate runs a test with every job template that runs sandboxes in
// Nomad.
func eachTemplate(t *testing.T, spec func(t *testing.T, template string)) {
	for _, template := range []string{"raw_exec", "docker"} {
		t.Run(template, func(t *testing.T) { spec(t, template) })
	}
}

func TestChatGetsItsOneSandbox(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		w := newWorld(t, template)
		r := w.start()
		chat := uuid.NewString()

		// When a chat's session is created, its sandbox answers and sees the volume.
		created := r.create(chat, w.body(), http.StatusCreated)
		must.Eq(t, "created", created.Result)
		must.Eq(t, "running", created.Session.State)
		must.Eq(t, "nomad", created.Session.Runtime)
		about, err := page(t, created.Session, "/")
		must.NoError(t, err)
		var self map[string]any
		must.NoError(t, json.Unmarshal([]byte(about), &self))
		must.Eq(t, created.Session.SessionID.String(), self["session_id"].(string))
		must.Eq(t, chat, self["chat_id"].(string))
		must.Eq(t, "agent-1", self["agent_id"].(string))
		file, err := page(t, created.Session, "/workspace/hello.txt")
		must.NoError(t, err)
		must.Eq(t, "from the host", file)

		// Then Nomad shows it as one batch job, whose allocation is the container.
		alloc, _, err := w.nomad.Allocations().Info(created.Session.ContainerID, nil)
		must.NoError(t, err)
		must.Eq(t, "bivouac-"+created.Session.SessionID.String(), alloc.JobID)
		must.Eq(t, chat, alloc.Job.Meta["chat_id"])
		must.Eq(t, "agent-1", alloc.Job.Meta["agent_id"])

		// When it is created again, it is reused unchanged.
		reused := r.create(chat, w.body(), http.StatusOK)
		must.Eq(t, wire.CreateAnswer{Result: "reused", Session: created.Session, AccessToken: created.AccessToken}, reused)

		// When it is asked for with another agent, the answer names the conflict.
		other := w.body()
		other.AgentID = "agent-2"
		conflict := call[wire.ErrorAnswer](r, http.MethodPut, sessionPath(chat), other, http.StatusConflict)
		must.Eq(t, wire.CodeConflict, conflict.Error.Code)
		must.Eq(t, "agent_id", conflict.Error.Reason)
		must.Eq(t, created.Session, *conflict.Session)

		// When it is read, alone and in a list, the answer is what was created.
		must.Eq(t, created.Session, r.get(chat))
		list := call[wire.ListAnswer](r, http.MethodGet, "/v1/sessions?agent_id=agent-1", nil, http.StatusOK)
		must.Eq(t, []wire.Session{created.Session}, list.Sessions)

		// When it is renewed, it expires later; a shorter TTL does not make it
		// expire sooner.
		renewed := call[wire.SessionAnswer](r, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{TTL: "2h"}, http.StatusOK)
		must.True(t, renewed.Session.ExpiresAt.After(created.Session.ExpiresAt))
		again := call[wire.SessionAnswer](r, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{TTL: "1m"}, http.StatusOK)
		must.Eq(t, renewed, again)

		// When it is deleted, no job, process, lock or record is left.
		must.Len(t, 1, w.liveAllocs(chat))
		must.SliceNotEmpty(t, processes(t, created.Session))
		deleted := r.delete(chat)
		must.Eq(t, "deleted", deleted.Result)
		must.Eq(t, created.Session.SessionID, deleted.SessionID)
		must.Eq(t, created.Session.ContainerID, deleted.ContainerID)
		must.SliceEmpty(t, processes(t, created.Session))
		must.SliceEmpty(t, w.jobs())
		must.SliceEmpty(t, w.keys(chat))
		gone := call[wire.ErrorAnswer](r, http.MethodGet, sessionPath(chat), nil, http.StatusNotFound)
		must.Eq(t, wire.CodeNotFound, gone.Error.Code)
		must.Eq(t, wire.DeleteAnswer{Result: "not_found", ChatID: uuid.MustParse(chat)}, r.delete(chat))
		must.SliceEmpty(t, w.keys(chat))
	})
}

func TestExpiredSessionIsReplacedOrCleanedUp(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		// Given two sessions that expire, and no automatic cleanup.
		w := newWorld(t, template, "-cleanup-interval=1h")
		r := w.start()
		body := w.body()
		body.TTL = "5s"
		replaced, cleaned := uuid.NewString(), uuid.NewString()
		first := r.create(replaced, body, http.StatusCreated).Session
		second := r.create(cleaned, body, http.StatusCreated).Session
		eventually(t, "both expired", func() error {
			if time.Now().Before(first.ExpiresAt) || time.Now().Before(second.ExpiresAt) {
				return errors.New("not yet")
			}
			return nil
		})

		// Then one of them cannot be renewed any more.
		late := call[wire.ErrorAnswer](r, http.MethodPost, sessionPath(replaced)+"/renew", wire.RenewRequest{TTL: "1h"}, http.StatusConflict)
		must.Eq(t, wire.CodeExpired, late.Error.Code)

		// When it is created, it is replaced, and the old sandbox is gone.
		next := r.create(replaced, w.body(), http.StatusCreated)
		must.Eq(t, "replaced", next.Result)
		must.NotEq(t, first.SessionID, next.Session.SessionID)
		must.SliceEmpty(t, processes(t, first))
		must.Len(t, 1, w.liveAllocs(replaced))

		// When the expired sessions are cleaned up, the other one goes and the
		// new one stays.
		res := call[wire.CleanupAnswer](r, http.MethodPost, "/v1/cleanup", nil, http.StatusOK)
		must.Eq(t, 0, res.ErrorCount)
		must.Len(t, 1, res.Cleaned)
		must.Eq(t, second.SessionID, res.Cleaned[0].SessionID)
		must.SliceEmpty(t, w.liveAllocs(cleaned))
		must.SliceEmpty(t, w.keys(cleaned))
		must.Eq(t, next.Session, r.get(replaced))
		r.delete(replaced)
	})
}

func TestCleanupRunsByItself(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	chat := uuid.NewString()
	body := w.body()
	body.TTL = "5s"
	r.create(chat, body, http.StatusCreated)
	eventually(t, "the session is cleaned up", func() error {
		status, _, err := r.try(http.MethodGet, sessionPath(chat), nil)
		if err == nil && status != http.StatusNotFound {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
	must.SliceEmpty(t, w.liveAllocs(chat))
	must.SliceEmpty(t, w.keys(chat))
}

func TestBlockingReadsWakeAtAChange(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	chat := uuid.NewString()
	r.create(chat, w.body(), http.StatusCreated)

	for name, path := range map[string]string{
		"one session":       sessionPath(chat) + "?",
		"the agent's list":  "/v1/sessions?agent_id=agent-1&",
		"the list of all":   "/v1/sessions?",
		"an absent session": sessionPath(uuid.NewString()) + "?",
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := r.api.Get("http://" + r.Addr + path)
			must.NoError(t, err)
			must.NoError(t, resp.Body.Close())
			index := resp.Header.Get(wire.HeaderIndex)
			must.NotEq(t, "", index)

			// Given a read that waits for the next change …
			absent := name == "an absent session"
			wait := "2m"
			if absent {
				wait = "10ms" // nothing will change, so it ends by itself
			}
			woken := make(chan error, 1)
			go func() {
				resp, err := r.api.Get("http://" + r.Addr + path + "index=" + index + "&wait=" + wait)
				if err == nil {
					err = resp.Body.Close()
					if resp.Header.Get(wire.HeaderIndex) == index && !absent {
						err = errors.Join(err, errors.New("woken with the same index"))
					}
				}
				woken <- err
			}()
			// … when the session changes, it returns.
			if !absent {
				call[wire.SessionAnswer](r, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{TTL: "5h"}, http.StatusOK)
			}
			must.NoError(t, <-woken)
		})
	}
	r.delete(chat)
}
