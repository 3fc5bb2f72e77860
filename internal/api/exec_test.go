package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestExec(t *testing.T) {
	for name, tc := range map[string]struct {
		body   string
		onExec func(context.Context, runtime.Streams) (int, error)
		want   string
	}{
		"returns_the_output_and_the_exit_code": {
			`{"command":["x"]}`, func(_ context.Context, s runtime.Streams) (int, error) {
				_, _ = io.WriteString(s.Stdout, "out")
				_, _ = io.WriteString(s.Stderr, "err")
				return 3, nil
			},
			`{"exit_code":3,"timed_out":false,"stdout":"out","stderr":"err","truncated":[]}`,
		},
		"passes_the_input": {
			`{"command":["x"],"stdin":"ü"}`, nil,
			`{"exit_code":0,"timed_out":false,"stdout":"ü","stderr":"","truncated":[]}`,
		},
		"returns_bytes_that_are_not_UTF-8_as_base64": {
			`{"command":["x"]}`, func(_ context.Context, s runtime.Streams) (int, error) {
				_, err := s.Stderr.Write([]byte{0xff, 0})
				return 0, err
			},
			`{"exit_code":0,"timed_out":false,"stdout":"","stderr":"","stderr_base64":"/wA=","truncated":[]}`,
		},
		"returns_the_output_before_the_time_was_over": {
			`{"command":["x"],"timeout":"1ms"}`, func(ctx context.Context, s runtime.Streams) (int, error) {
				_, _ = io.WriteString(s.Stdout, "so far")
				<-ctx.Done()
				return 0, ctx.Err()
			},
			`{"exit_code":null,"timed_out":true,"stdout":"so far","stderr":"","truncated":[]}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{onExec: tc.onExec}
			res, body := start(t, f).send(request{method: "POST", path: sessionURL + "/exec", body: tc.body})
			must.Eq(t, 200, res.StatusCode, must.Sprint(body))
			must.Eq(t, tc.want+"\n", body)
			must.Eq(t, 1, f.released)
		})
	}

	t.Run("cuts_long_output_before_a_character", func(t *testing.T) {
		long := strings.Repeat("ü", 1<<20)
		f := &fake{onExec: func(_ context.Context, s runtime.Streams) (int, error) {
			_, err := io.WriteString(s.Stdout, "x"+long)
			return 0, err
		}}
		_, body := start(t, f).send(exec)
		var answer wire.ExecAnswer
		must.NoError(t, json.Unmarshal([]byte(body), &answer))
		must.Eq(t, []string{"stdout"}, answer.Truncated)
		must.True(t, answer.Stdout == "x"+long[:1<<20-2])
	})

	t.Run("passes_all_fields", func(t *testing.T) {
		f := &fake{}
		start(t, f).send(request{method: "POST", path: sessionURL + "/exec?renew=30m", body: `{"command":["a","b"],"env":{"K":"V"},"dir":"/d","user":"u","task":"t"}`})
		must.Eq(t, runtime.Command{Args: []string{"a", "b"}, Env: map[string]string{"K": "V"}, Dir: "/d", User: "u", Task: "t"}, f.command)
		must.Eq(t, "30m0s", f.ttl.String())
	})

	for body, want := range map[string]string{
		`{}`:                                    "there is no command",
		`{"command":[]}`:                        "there is no command",
		`{"command":"sh"}`:                      "command is not a list",
		`{"command":["sh",1]}`:                  "command.1 is not a string",
		`{"command":["sh"],"dir":"tmp"}`:        `folder "tmp" is not absolute`,
		`{"command":["sh"],"env":{"A B":""}}`:   `variable "A B"`,
		`{"command":["sh"],"timeout":"11m"}`:    "timeout is over 10m0s",
		`{"command":["sh"],"timeout":"0s"}`:     "timeout is not more than zero",
		`{"command":["sh"],"tty":"true"}`:       `unknown field "tty"`,
		`{"command":["sh"],"command":["bash"]}`: "duplicate field command",
	} {
		t.Run("refuses_"+body, func(t *testing.T) {
			f := &fake{}
			status, refusal := start(t, f).refused(request{method: "POST", path: sessionURL + "/exec", body: body})
			must.Eq(t, 400, status)
			must.StrContains(t, refusal.Message, want)
			must.Eq(t, 0, f.calls)
		})
	}
}

// dialExec opens a websocket for a command.
func dialExec(t *testing.T, a *agent, query string, header http.Header) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	conn, res, err := websocket.Dial(t.Context(), a.url+sessionURL+"/exec?"+query, &websocket.DialOptions{HTTPHeader: header})
	if err == nil {
		t.Cleanup(func() { _ = conn.CloseNow() })
	}
	return conn, res, err
}

func send(t *testing.T, conn *websocket.Conn, text string) {
	t.Helper()
	must.NoError(t, conn.Write(t.Context(), websocket.MessageText, []byte(text)))
}

func receive(t *testing.T, conn *websocket.Conn) string {
	t.Helper()
	_, text, err := conn.Read(t.Context())
	must.NoError(t, err)
	return string(text)
}

const cat = "command=%5B%22cat%22%5D"

func TestExecStream(t *testing.T) {
	t.Run("passes_messages_both_ways", func(t *testing.T) {
		f := &fake{}
		a := start(t, f)
		conn, _, err := dialExec(t, a, cat+"&tty=true&rows=10&columns=20&env=%7B%22K%22%3A%22V%22%7D&dir=/d", nil)
		must.NoError(t, err)
		send(t, conn, `{"stdin":{"data":"aGk="}}`)
		must.Eq(t, `{"stdout":{"data":"aGk="}}`, receive(t, conn))
		send(t, conn, `{}`)
		send(t, conn, `{"stdin":{"close":true}}`)
		must.Eq(t, `{"exited":true,"result":{"exit_code":0}}`, receive(t, conn))
		_, _, err = conn.Read(t.Context())
		must.Eq(t, websocket.StatusNormalClosure, websocket.CloseStatus(err))
		<-a.served
		must.Eq(t, 1, f.released)
		must.Eq(t, runtime.Command{
			Args: []string{"cat"}, TTY: true, Size: runtime.WindowSize{Rows: 10, Columns: 20}, Env: map[string]string{"K": "V"}, Dir: "/d",
		}, f.command)
	})

	t.Run("passes_sizes", func(t *testing.T) {
		sizes := make(chan runtime.WindowSize)
		a := start(t, &fake{onExec: func(_ context.Context, s runtime.Streams) (int, error) {
			sizes <- <-s.Resize
			return 7, nil
		}})
		conn, _, err := dialExec(t, a, cat, nil)
		must.NoError(t, err)
		send(t, conn, `{"tty_size":{"height":3,"width":4}}`)
		must.Eq(t, runtime.WindowSize{Rows: 3, Columns: 4}, <-sizes)
		must.Eq(t, `{"exited":true,"result":{"exit_code":7}}`, receive(t, conn))
	})

	t.Run("ends_the_command_when_the_caller_goes", func(t *testing.T) {
		ended := make(chan error, 1)
		a := start(t, &fake{onExec: untilEnded(ended)})
		conn, _, err := dialExec(t, a, cat, nil)
		must.NoError(t, err)
		must.NoError(t, conn.CloseNow())
		must.ErrorIs(t, <-ended, context.Canceled)
		<-a.served
	})

	t.Run("tells_why_there_is_no_exit_code", func(t *testing.T) {
		a := start(t, &fake{onExec: func(context.Context, runtime.Streams) (int, error) {
			return 0, errors.Join(scheduler.ErrNotRunning, errors.New("the session has ended"))
		}})
		conn, _, err := dialExec(t, a, cat, http.Header{wire.HeaderRequestID: {"r1"}})
		must.NoError(t, err)
		must.Eq(t, `{"exited":true,"result":{"exit_code":-1,"error":{"code":"not_running","message":"sandbox not running\nthe session has ended","request_id":"r1"}}}`, receive(t, conn))
	})

	t.Run("ends_with_a_close_frame_when_the_server_stops", func(t *testing.T) {
		ended := make(chan error, 1)
		a := start(t, &fake{onExec: untilEnded(ended)})
		conn, _, err := dialExec(t, a, cat, nil)
		must.NoError(t, err)
		must.NoError(t, a.server.Shutdown(t.Context()))
		must.StrContains(t, receive(t, conn), `"code":"shutting_down"`)
		_, _, err = conn.Read(t.Context())
		must.Eq(t, websocket.StatusGoingAway, websocket.CloseStatus(err))
		must.ErrorContains(t, err, "this server is shutting down")
		<-a.served
		must.ErrorIs(t, <-ended, context.Canceled)
	})

	t.Run("tells_that_the_credential_expired", func(t *testing.T) {
		ended := make(chan error, 1)
		a := start(t, &fake{onExec: untilEnded(ended)}, func(c *api.Config) {
			c.Authenticate = func(context.Context, string, string) (scheduler.Caller, error) {
				return scheduler.Caller{Name: "ci", Method: "jwt/ci", Expires: time.Now()}, nil
			}
		})
		conn, _, err := dialExec(t, a, cat, nil)
		must.NoError(t, err)
		text := receive(t, conn)
		must.StrContains(t, text, `"code":"unauthenticated"`)
		must.StrContains(t, text, "the credential expired")
		must.Error(t, <-ended)
	})

	t.Run("refuses_a_web_page_of_another_origin", func(t *testing.T) {
		a := start(t, &fake{})
		_, res, err := dialExec(t, a, cat, http.Header{"Origin": {"https://evil.example"}})
		must.Error(t, err)
		must.Eq(t, 403, res.StatusCode)
	})

	for _, method := range []string{"GET", "HEAD"} {
		t.Run("renews_nothing_for_what_is_no_websocket_with_"+method, func(t *testing.T) {
			f := &fake{}
			res, _ := start(t, f).send(request{method: method, path: sessionURL + "/exec?renew=30m&" + cat})
			must.Eq(t, 426, res.StatusCode)
			must.Zero(t, f.ttl)
		})
	}

	t.Run("refuses_before_the_upgrade", func(t *testing.T) {
		a := start(t, &fake{err: scheduler.ErrNotFound})
		_, res, err := dialExec(t, a, cat, nil)
		must.Error(t, err)
		must.Eq(t, 404, res.StatusCode)
	})

	t.Run("ends_the_connection_after_a_message_that_is_too_long", func(t *testing.T) {
		ended := make(chan error, 1)
		a := start(t, &fake{onExec: untilEnded(ended)})
		conn, _, err := dialExec(t, a, cat, nil)
		must.NoError(t, err)
		_ = conn.Write(t.Context(), websocket.MessageText, make([]byte, 256<<10)) // it may be cut off
		must.ErrorIs(t, <-ended, context.Canceled)
	})

	for _, query := range []string{"", "command=sh", "command=%5B%5D", cat + "&tty=maybe", cat + "&rows=0&columns=1", cat + "&rows=1", cat + "&env=x"} {
		t.Run("refuses_"+query, func(t *testing.T) {
			_, res, err := dialExec(t, start(t, &fake{}), query, nil)
			must.Error(t, err)
			must.Eq(t, 400, res.StatusCode)
		})
	}
}

// untilEnded is a command that runs until its context ends.
func untilEnded(ended chan<- error) func(context.Context, runtime.Streams) (int, error) {
	return func(ctx context.Context, _ runtime.Streams) (int, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return 0, ctx.Err()
	}
}
