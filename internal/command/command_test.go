package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
)

// newTerminal stands before an agent that gives the same answer to everything.
func newTerminal(t *testing.T, status int, answer string) (_ terminal, out, err *bytes.Buffer) {
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(status)
		_, _ = w.Write([]byte(answer))
	}))
	t.Cleanup(agent.Close)
	out, err = &bytes.Buffer{}, &bytes.Buffer{}
	return terminal{out: out, err: err, getenv: func(name string) string {
		return map[string]string{"BIVOUAC_ADDR": agent.URL}[name]
	}}, out, err
}

func TestExitCodes(t *testing.T) {
	for _, test := range []struct {
		name   string
		status int
		answer string
		want   int
		told   string
	}{
		{"created", 201, `{"result":"created","session":{"state":"running"}}`, exitDone, ""},
		{"not placed", 503, `{"error":{"code":"not_placed","message":"no room"}}`, exitNotPlaced, "Error: no room\nIt may work in 30s.\n"},
		{"not found", 404, `{"error":{"code":"not_found","message":"no session"}}`, exitNotFound, "Error: no session\n"},
		{"conflict", 409, `{"error":{"code":"conflict","message":"agent_id differs"}}`, exitConflict, "Error: agent_id differs\n"},
		{"expired", 409, `{"error":{"code":"expired","message":"it has expired"}}`, exitConflict, "Error: it has expired\n"},
		{"not running", 409, `{"error":{"code":"not_running","message":"it is dead"}}`, exitConflict, "Error: it is dead\n"},
		{"another path", 404, `{"error":{"code":"unknown_path","message":"no such path"}}`, exitError, "Error: no such path\n"},
		{"not ready", 504, `{"error":{"code":"not_ready","message":"too slow"}}`, exitError, "Error: too slow\n"},
		{"not an agent", 502, `<html>`, exitError, "Error: unexpected answer: 502 Bad Gateway\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			terminal, out, told := newTerminal(t, test.status, test.answer)
			code := sessionCreateCommand(terminal).Run([]string{"-agent-id=a", "-volume-host-path=/v", uuid.NewString()})
			must.Eq(t, test.want, code)
			must.StrContains(t, told.String(), test.told)
			must.Eq(t, test.want == exitDone, out.Len() > 0)
		})
	}
}

func TestToken(t *testing.T) {
	const fromVariable, fromFile = "bvk_variable", "bvk_file"
	file := filepath.Join(t.TempDir(), "token")
	must.NoError(t, os.WriteFile(file, []byte(fromFile+"\n"), 0o600))
	var got string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Get(wire.HeaderToken)
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = w.Write([]byte(`{"error":{"code":"unauthenticated","message":"unknown token"}}`))
	}))
	t.Cleanup(server.Close)
	for _, test := range []struct {
		name      string
		variables map[string]string
		args      []string
		want      string
		told      string
	}{
		{"of the variable", map[string]string{"BIVOUAC_TOKEN": fromVariable}, nil, fromVariable, "unknown token"},
		{"of the file, which counts more", map[string]string{"BIVOUAC_TOKEN": fromVariable, "BIVOUAC_TOKEN_FILE": file}, nil, fromFile, "unknown token"},
		{"of the flag's file", map[string]string{"BIVOUAC_TOKEN_FILE": "/no/such"}, []string{"-token-file=" + file}, fromFile, "unknown token"},
		{"that is missing", nil, nil, "", "Set BIVOUAC_TOKEN or BIVOUAC_TOKEN_FILE"},
		{"whose file is missing", map[string]string{"BIVOUAC_TOKEN_FILE": "/no/such"}, nil, "", "/no/such: no such file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got = ""
			var out, told bytes.Buffer
			terminal := terminal{out: &out, err: &told, getenv: func(name string) string {
				if name == "BIVOUAC_ADDR" {
					return server.URL
				}
				return test.variables[name]
			}}
			c := sessionListCommand(terminal)
			must.Eq(t, exitError, c.Run(test.args))
			must.Eq(t, test.want, got)
			must.StrContains(t, told.String(), test.told)
			for _, token := range []string{fromVariable, fromFile} {
				must.StrNotContains(t, out.String()+told.String()+c.Help(), token)
			}
		})
	}
}

func TestErrorsAsJSON(t *testing.T) {
	for _, test := range []struct {
		name   string
		status int
		answer string
		want   string
	}{
		{"as the API has it", 503, `{"error":{"code":"not_placed","message":"no <room>"}}`,
			`{"error":{"code":"not_placed","message":"no <room>","request_id":""},"retry_after":30}`},
		{"of something else", 502, `<html>`,
			`{"error":{"code":"failed","message":"unexpected answer: 502 Bad Gateway","request_id":""},"retry_after":30}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			terminal, out, told := newTerminal(t, test.status, test.answer)
			sessionCreateCommand(terminal).Run([]string{"-json", "-agent-id=a", "-volume-host-path=/v", uuid.NewString()})
			must.Eq(t, test.want+"\n", told.String())
			must.Eq(t, 0, out.Len())
		})
	}
}

func TestACleanupWithFailuresFails(t *testing.T) {
	terminal, out, told := newTerminal(t, 200, `{"cleaned":[],"error_count":2}`)
	must.Eq(t, exitError, cleanupCommand(terminal).Run(nil))
	must.Eq(t, "0 ended, 2 failed\n", out.String())
	must.StrContains(t, told.String(), "could not be ended")
}

func TestForgetTellsHowToSeeWhatIsLeft(t *testing.T) {
	terminal, out, _ := newTerminal(t, 200, `{"instance":"prod-b","left":[{"instance":"prod-a","sandboxes":2,"look":"nomad operator api /v1/jobs"}]}`)
	must.Eq(t, exitDone, operatorForgetCommand(terminal).Run(nil))
	must.Eq(t, "Instance prod-b\n2 sandboxes of instance prod-a are left alone. They are shown by\n  nomad operator api /v1/jobs\n", out.String())
}

func TestEveryCommandHasItsHelp(t *testing.T) {
	for name, factory := range commands(terminal{getenv: func(string) string { return "" }}) {
		made, err := factory()
		must.NoError(t, err)
		c := made.(*command)
		must.NotEq(t, "", c.Synopsis(), must.Sprint(name))
		must.StrContains(t, c.Help(), "Usage: bivouac "+name)
		must.True(t, c.run == nil || c.example != "", must.Sprintf("%s has no example", name))
	}
}

func TestWatchTellsEachChangeOnce(t *testing.T) {
	chat := uuid.New()
	first := wire.Session{ChatID: chat, SessionID: uuid.New(), State: "running"}
	second := first
	second.SessionID = uuid.New() // replaced
	dead := second
	dead.State, dead.Reason = "dead", "exit code 3"
	over := errors.New("over")
	looks := []struct {
		sessions []wire.Session
		err      error
	}{
		{sessions: []wire.Session{first}},
		{sessions: []wire.Session{first}}, // a wait that ended without a change
		{err: &apiclient.Error{Code: wire.CodeStoreUnavailable, RetryAfter: time.Minute}},
		{sessions: []wire.Session{second}},
		{sessions: []wire.Session{dead}},
		{sessions: nil},
		{err: over},
	}
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var told []change
		err := watcher{
			look: func(_ context.Context, index uint64) ([]wire.Session, uint64, error) {
				next := looks[0]
				looks = looks[1:]
				return next.sessions, index + 1, next.err
			},
			tell: func(c change) error {
				told = append(told, c)
				return nil
			},
			retrying: func(error, time.Duration) {},
		}.watch(t.Context())
		must.ErrorIs(t, err, over)
		must.Len(t, 4, told)
		must.Eq(t, first, *told[0].Session)
		must.Eq(t, second, *told[1].Session)
		must.Eq(t, dead, *told[2].Session)
		must.StrContains(t, told[2].String(), "dead  -  expires 0001-01-01T00:00:00Z  exit code 3")
		must.Nil(t, told[3].Session)
		must.Eq(t, chat, told[3].ChatID)
		must.Eq(t, time.Minute, time.Since(began))
	})
}

func TestWatchGoesOnWhenItsServerIsBack(t *testing.T) {
	session := wire.Session{ChatID: uuid.New(), SessionID: uuid.New(), State: "running"}
	down := fmt.Errorf("%w: refused", apiclient.ErrUnreachable)
	broken := &apiclient.Error{Status: http.StatusBadGateway}

	t.Run("it asks anew, with pauses that are bounded", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var indexes []uint64
			var pauses []time.Duration
			tries := 0
			err := watcher{
				look: func(_ context.Context, index uint64) ([]wire.Session, uint64, error) {
					indexes = append(indexes, index)
					switch tries++; tries {
					case 1:
						return []wire.Session{session}, 7, nil
					case 30:
						cancel()
						return nil, 0, ctx.Err()
					case 3:
						return nil, 0, broken
					default:
						return nil, 0, down
					}
				},
				tell:     func(change) error { return nil },
				retrying: func(_ error, pause time.Duration) { pauses = append(pauses, pause) },
			}.watch(ctx)
			must.NoError(t, err)
			must.Len(t, 28, pauses)
			for _, pause := range pauses {
				must.Between(t, firstRetry/2, pause, 2*longestRetry)
			}
			must.Eq(t, []uint64{0, 7, 0, 0}, indexes[:4])
		})
	})
	t.Run("but ends where there never was one", func(t *testing.T) {
		err := watcher{
			look: func(context.Context, uint64) ([]wire.Session, uint64, error) { return nil, 0, down },
		}.watch(t.Context())
		must.ErrorIs(t, err, apiclient.ErrUnreachable)
	})
	t.Run("and ends once the one session it is about is gone", func(t *testing.T) {
		looks := [][]wire.Session{nil, {session}, nil}
		told := 0
		err := watcher{
			look: func(context.Context, uint64) ([]wire.Session, uint64, error) {
				next := looks[0]
				looks = looks[1:]
				return next, 1, nil
			},
			tell:      func(change) error { told++; return nil },
			untilGone: true,
		}.watch(t.Context())
		must.NoError(t, err)
		must.Eq(t, 2, told)
	})
}

func TestLongTextsOfATableAreCutOff(t *testing.T) {
	must.Eq(t, "a b", column("a\n\tb "))
	must.Eq(t, strings.Repeat("ä", maxColumn), column(strings.Repeat("ä", maxColumn)))
	must.Eq(t, strings.Repeat("ä", maxColumn-1)+"…", column(strings.Repeat("ä", maxColumn+1)))
}

func TestPrintable(t *testing.T) {
	must.Eq(t, "a\tb\nü \uFFFD[31m\uFFFD\uFFFD\uFFFD می\u200cخواهم", printable("a\tb\nü \x1b[31m\r\u009b\u202e می\u200cخواهم"))
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 1500 * time.Millisecond: "1s", 123 * time.Second: "2m3s", 3*time.Hour + 5*time.Minute + time.Second: "3h5m", 51 * time.Hour: "2d3h",
	} {
		must.Eq(t, want, age(d))
	}
}
