package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
)

// tell makes a request to the sandbox's own server.
func tell(t *testing.T, s wire.Session, path, text string) error {
	t.Helper()
	must.NotNil(t, s.Endpoint)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.Endpoint.AddrPort().String()+path, strings.NewReader(text))
	must.NoError(t, err)
	resp, err := (&http.Client{Timeout: patience}).Do(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("POST %s: %s", path, resp.Status)
	}
	_ = resp.Body.Close()
	return err
}

// follower follows a log.
type follower struct {
	mu    sync.Mutex
	text  bytes.Buffer
	ended chan struct{}
	end   wire.LogEnd
	err   error
}

func (f *follower) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.text.Write(p)
}

func (f *follower) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.text.String()
}

// follow follows the chat's log until it ends, or the test does.
func (r *replica) follow(chat string) *follower {
	r.t.Helper()
	client, err := apiclient.New(r.Addr, nil)
	must.NoError(r.t, err)
	f := &follower{ended: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(f.ended)
		f.end, f.err = client.Logs(ctx, uuid.MustParse(chat), apiclient.LogsInput{Tail: -1, Follow: true}, f)
	}()
	r.t.Cleanup(func() {
		cancel()
		<-f.ended
	})
	return f
}

func (f *follower) awaitText(t *testing.T, want string) {
	t.Helper()
	eventually(t, "the follower has "+want, func() error {
		if text := f.String(); text != want {
			return fmt.Errorf("it has %q", text)
		}
		return nil
	})
}

// readLog returns what is kept of a log.
func (r *replica) readLog(chat, query string) string {
	r.t.Helper()
	status, text, err := r.try(http.MethodGet, sessionPath(chat)+"/logs"+query, nil)
	must.NoError(r.t, err)
	must.Eq(r.t, http.StatusOK, status, must.Sprintf("%s", text))
	return string(text)
}

func TestLogs(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		w := newWorld(t, template, "-job-var=logs=true")
		first, second := w.start(), w.start()
		chat := uuid.NewString()
		session := first.create(chat, w.body(), http.StatusCreated).Session
		must.NoError(t, tell(t, session, "/print", "one\ntwo\n"))
		must.NoError(t, tell(t, session, "/print?stream=stderr", "three\n"))

		// Each replica reads what the sandbox has printed, and follows what it prints.
		eventually(t, "Nomad has kept all", func() error {
			if out, err := second.readLog(chat, ""), second.readLog(chat, "?type=stderr"); out != "one\ntwo\n" || err != "three\n" {
				return fmt.Errorf("it has %q and %q", out, err)
			}
			return nil
		})
		must.Eq(t, "two\n", first.readLog(chat, "?tail=1"))
		one, other := first.follow(chat), second.follow(chat)
		one.awaitText(t, "one\ntwo\n")
		other.awaitText(t, "one\ntwo\n")
		must.NoError(t, tell(t, session, "/print", "more\n"))
		one.awaitText(t, "one\ntwo\nmore\n")
		other.awaitText(t, "one\ntwo\nmore\n")

		// When a replica stops, its follower is told, and that of another goes on.
		first.stop(syscall.SIGTERM)
		<-one.ended
		must.NoError(t, one.err)
		must.Eq(t, wire.LogEnd{State: "running", Reason: "server shutting down"}, one.end)

		// When the sandbox ends, the follower has all of its output, and the reason.
		must.NoError(t, tell(t, session, "/print", "last\n"))
		_ = tell(t, session, "/exit", "") // it may end before it answers
		<-other.ended
		must.NoError(t, other.err)
		must.Eq(t, "one\ntwo\nmore\nlast\n", other.String())
		must.Eq(t, "dead", other.end.State)
		must.StrContains(t, other.end.Reason, "exit code 1")
		must.Eq(t, "last\n", second.readLog(chat, "?tail=1"))

		// The next session of the chat has its own log.
		next := second.create(chat, w.body(), http.StatusCreated)
		must.Eq(t, "replaced", next.Result)
		must.Eq(t, "", second.readLog(chat, ""))
		last := second.follow(chat)
		must.NoError(t, tell(t, next.Session, "/print", "next\n"))
		last.awaitText(t, "next\n")
		second.delete(chat)
		<-last.ended
		must.NoError(t, last.err)
		must.Eq(t, wire.LogEnd{State: "deleted"}, last.end)
		must.Eq(t, "one\ntwo\nmore\nlast\n", other.String())
		gone := call[wire.ErrorAnswer](second, http.MethodGet, sessionPath(chat)+"/logs", nil, http.StatusNotFound)
		must.Eq(t, wire.CodeNotFound, gone.Error.Code)
	})
}

func TestLogs_areDisabled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec", "-job-var=logs=false")
	r := w.start()
	chat := uuid.NewString()
	r.create(chat, w.body(), http.StatusCreated)
	refused := call[wire.ErrorAnswer](r, http.MethodGet, sessionPath(chat)+"/logs", nil, http.StatusConflict)
	must.Eq(t, wire.CodeLogsDisabled, refused.Error.Code)
	must.StrContains(t, refused.Error.Message, "set logs = true in the server's job_vars")
}
