package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// lastOfVersion1 is the last commit that writes records of version 1. It cannot
// read records of other versions.
const lastOfVersion1 = "d126da0a116d34d5565704d9924496713c6ad5d0"

// buildOf builds the bivouac of a commit and returns its path. It returns "" if
// this is not a clone with the full history.
func buildOf(t *testing.T, commit string) string {
	t.Helper()
	dir := t.TempDir()
	run := func(in, name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = in
		text, err := cmd.CombinedOutput()
		must.NoError(t, err, must.Sprintf("%s %s: %s", name, strings.Join(args, " "), text))
		return strings.TrimSpace(string(text))
	}
	shallow, err := exec.CommandContext(t.Context(), "git", "rev-parse", "--is-shallow-repository").Output()
	if err != nil || strings.TrimSpace(string(shallow)) == "true" {
		return ""
	}
	root := run(".", "git", "rev-parse", "--show-toplevel")
	source, archive, built := filepath.Join(dir, "source"), filepath.Join(dir, "source.tar"), filepath.Join(dir, "bivouac")
	must.NoError(t, os.Mkdir(source, 0o755))
	run(root, "git", "archive", "--output="+archive, commit)
	run(source, "tar", "-xf", archive)
	run(source, "go", "build", "-o", built, "./cmd/bivouac")
	return built
}

// recordVersion returns the version of the chat's record.
func (w *world) recordVersion(chat string) string {
	w.t.Helper()
	version, _, _ := strings.Cut(strings.TrimPrefix(string(w.value(w.recordKey(chat))), `{"v":`), ",")
	return version
}

// TestReplicaFromBeforeRecordsCouldGrow runs an old and a new replica side by
// side. The old one answers 500 for each chat that the new one has written to.
// Neither of them ends or loses anything or starts a second sandbox.
func TestReplicaFromBeforeRecordsCouldGrow(t *testing.T) {
	build := buildOf(t, lastOfVersion1)
	if build == "" {
		t.Log("NOT CHECKED: the older build needs a clone with the whole history")
		return
	}
	w := newWorld(t, "raw_exec")
	// Answers of the old replica lack newer fields of sessions, so they are not
	// checked against openapi.json.
	older := w.launchBuild(build, &http.Client{Timeout: callLimit})
	older.awaitHealthy()
	first, second := uuid.NewString(), uuid.NewString()
	sessions := map[string]uuid.UUID{ // session IDs by chat
		first:  older.create(first, w.body(), http.StatusCreated).Session.SessionID,
		second: older.create(second, w.body(), http.StatusCreated).Session.SessionID,
	}
	refused := func(chat string) {
		t.Helper()
		for _, method := range []string{http.MethodPut, http.MethodGet, http.MethodDelete} {
			var body any
			if method == http.MethodPut {
				body = w.body()
			}
			answer := call[wire.ErrorAnswer](older, method, sessionPath(chat), body, http.StatusInternalServerError)
			must.Eq(t, wire.CodeDamagedRecord, answer.Error.Code)
		}
	}

	newer := w.start()

	// Both serve what only the old one has written, and a reuse changes
	// nothing.
	for chat, session := range sessions {
		found := newer.create(chat, w.body(), http.StatusOK).Session
		must.Eq(t, session, found.SessionID)
		must.Eq(t, "anonymous", found.Owner)
		must.MapEmpty(t, found.Labels)
		must.Eq(t, "1", w.recordVersion(chat))
		must.Eq(t, session, older.create(chat, w.body(), http.StatusOK).Session.SessionID)
	}

	// The old one refuses what the new one has written.
	labelled := w.body()
	labelled.Labels = map[string]string{"ticket": "4711"}
	third := uuid.NewString()
	created := newer.create(third, labelled, http.StatusCreated).Session
	must.Eq(t, labelled.Labels, created.Labels)
	sessions[third] = created.SessionID
	refused(third)
	call[wire.SessionAnswer](newer, http.MethodPost, sessionPath(first)+"/renew", wire.RenewRequest{TTL: "1h"}, http.StatusOK)
	must.Eq(t, "3", w.recordVersion(first))
	refused(first)
	call[wire.SessionAnswer](older, http.MethodPost, sessionPath(second)+"/renew", wire.RenewRequest{TTL: "1h"}, http.StatusOK)
	must.Eq(t, "1", w.recordVersion(second))
	listed := call[wire.ListAnswer](older, http.MethodGet, "/v1/sessions", nil, http.StatusOK)
	must.Len(t, 1, listed.Sessions, must.Sprint("the list passes over what it cannot read"))

	// A chat that both are asked for at the same time gets one sandbox.
	var asked sync.WaitGroup
	for range 8 {
		chat := uuid.NewString()
		sessions[chat] = uuid.Nil
		for _, r := range []*replica{older, newer} {
			asked.Go(func() {
				if _, _, err := r.try(http.MethodPut, sessionPath(chat), w.body()); err != nil {
					t.Error(err)
				}
			})
		}
	}
	asked.Wait()
	for chat, session := range sessions {
		if session == uuid.Nil {
			sessions[chat] = newer.create(chat, w.body(), http.StatusOK).Session.SessionID
		}
	}

	// The leader looks for sandboxes without a record after a while. Here the
	// old replica does so at once, and it takes none of these for one.
	adopted := call[wire.AdoptAnswer](older, http.MethodPost, "/v1/operator/adopt", nil, http.StatusOK)
	must.Eq(t, 0, adopted.Adopted)
	call[wire.CleanupAnswer](older, http.MethodPost, "/v1/cleanup", nil, http.StatusOK)
	short := w.body()
	short.TTL = "5s"
	expires := uuid.NewString()
	newer.create(expires, short, http.StatusCreated)
	eventually(t, "the newer one cleans up", func() error {
		if keys := w.keys(expires); len(keys) > 0 {
			return fmt.Errorf("keys %q", keys)
		}
		return nil
	})
	for chat := range sessions {
		must.Len(t, 1, w.liveAllocs(chat), must.Sprint("one sandbox of each chat"))
	}

	// When the old one is stopped, everything works.
	older.stop(syscall.SIGINT)
	for chat, session := range sessions {
		found := newer.create(chat, w.body(), http.StatusOK)
		must.Eq(t, session, found.Session.SessionID)
		must.Eq(t, "deleted", newer.delete(chat).Result)
		must.SliceEmpty(t, processes(t, found.Session))
		must.SliceEmpty(t, w.keys(chat))
	}
}
