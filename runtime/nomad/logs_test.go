package nomad_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// printing returns the raw_exec template for sandboxes that keep logs. They run a shell
// script first and then serve.
func printing(t testing.TB, script string) *jobs.Template {
	t.Helper()
	self, err := os.Executable()
	must.NoError(t, err)
	return rawExec(t, map[string]string{
		"logs": "true", "command": "/bin/sh",
		"args": fmt.Sprintf("[%q, %q]", "-c", script+"; exec "+self+" demo-sandbox"),
	})
}

// logText returns what a query selects. It checks that the offsets fit.
func logText(t testing.TB, r replica, sessionID string, query runtime.LogQuery) string {
	t.Helper()
	var text strings.Builder
	next := int64(-1)
	for chunk, err := range r.Logs(patiently(t), sessionID, query) {
		must.NoError(t, err)
		must.Eq(t, query.Stream, chunk.Stream)
		must.LessEq(t, chunk.Offset, next)
		text.Write(chunk.Data)
		next = chunk.Offset + int64(len(chunk.Data))
	}
	return text.String()
}

// awaitLog waits until a log has the given text. Nomad writes it to a file some time
// after the sandbox has printed it.
func awaitLog(t testing.TB, r replica, sessionID string, stream runtime.LogStream, want string) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.TestFunc(func() (bool, error) {
		text := logText(t, r, sessionID, runtime.LogQuery{Stream: stream})
		return text == want, fmt.Errorf("the log is %q", text)
	})))
}

func TestLogs(t *testing.T) {
	t.Parallel()
	r := openShared(t, printing(t, "echo one; echo two; echo three >&2"))
	spec, _ := create(t, r)
	awaitLog(t, r, spec.SessionID, runtime.Stdout, "one\ntwo\n")
	awaitLog(t, r, spec.SessionID, runtime.Stderr, "three\n")
	for name, test := range map[string]struct {
		query runtime.LogQuery
		want  string
	}{
		"by the task's name":    {runtime.LogQuery{Stream: runtime.Stdout, Task: "sandbox"}, "one\ntwo\n"},
		"from an offset":        {runtime.LogQuery{Stream: runtime.Stdout, Offset: 4}, "two\n"},
		"from the end":          {runtime.LogQuery{Stream: runtime.Stdout, Offset: -3}, "wo\n"},
		"from before the begin": {runtime.LogQuery{Stream: runtime.Stdout, Offset: -100}, "one\ntwo\n"},
		"from after the end":    {runtime.LogQuery{Stream: runtime.Stdout, Offset: 100}, ""},
	} {
		t.Run(name, func(t *testing.T) { must.Eq(t, test.want, logText(t, r, spec.SessionID, test.query)) })
	}
	for name, test := range map[string]struct {
		sessionID string
		query     runtime.LogQuery
		want      error
		message   string
	}{
		"an unknown sandbox": {uuid.NewString(), runtime.LogQuery{Stream: runtime.Stdout}, runtime.ErrNotFound, ""},
		"an unknown stream":  {spec.SessionID, runtime.LogQuery{Stream: "stdin"}, runtime.ErrInvalid, `unknown stream "stdin"`},
		"an unknown task":    {spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Task: "web"}, runtime.ErrInvalid, `unknown task "web" (available: sandbox)`},
	} {
		t.Run(name, func(t *testing.T) { refused(t, r, test.sessionID, test.query, test.want, test.message) })
	}
	t.Run("of another instance", func(t *testing.T) {
		refused(t, openShared(t, rawExec(t, nil)), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout}, runtime.ErrConflict, "")
	})
	t.Run("of a sandbox that ended, until it is deleted", func(t *testing.T) {
		must.NoError(t, r.Stop(patiently(t), spec.SessionID))
		must.Eq(t, "one\ntwo\n", logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}))
		must.NoError(t, r.Delete(patiently(t), spec.SessionID))
		refused(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout}, runtime.ErrNotFound, "")
	})
}

// refused reads a log that cannot be read.
func refused(t *testing.T, r replica, sessionID string, query runtime.LogQuery, want error, message string) {
	t.Helper()
	errs := 0
	for _, err := range r.Logs(patiently(t), sessionID, query) {
		must.ErrorIs(t, err, want)
		must.ErrorContains(t, err, message)
		errs++
	}
	must.Eq(t, 1, errs)
}

func TestLogs_are_disabled(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, map[string]string{"logs": "false"}))
	spec, _ := create(t, r)
	refused(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout}, runtime.ErrLogsDisabled, "set logs = true in the server's job_vars")
}

func TestLogs_follow(t *testing.T) {
	t.Parallel()
	// The sandbox prints what is written to a named pipe.
	r := openShared(t, printing(t, `cd "$BIVOUAC_WORKSPACE"; echo begin; mkfifo orders; cat <>orders >&1 & :`))
	t.Run("goes on until the sandbox ends, and has all that it printed", func(t *testing.T) {
		spec, _ := create(t, r)
		order := func(text string) {
			must.NoError(t, os.WriteFile(filepath.Join(spec.VolumeHostPath, "orders"), []byte(text), 0))
		}
		var text string
		for chunk, err := range r.Logs(patiently(t), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
			must.NoError(t, err)
			text += string(chunk.Data)
			switch text {
			case "begin\n":
				order("more\n")
			case "begin\nmore\n":
				order("last\n")
				_, _, err := r.client.Jobs().Deregister(jobs.ID(spec.SessionID), false, nil)
				must.NoError(t, err)
			}
		}
		must.Eq(t, "begin\nmore\nlast\n", text)
	})
	t.Run("ends with its context, within a second", func(t *testing.T) {
		spec, _ := create(t, r)
		ctx, cancel := context.WithCancel(patiently(t))
		defer cancel()
		var cancelled time.Time
		var last error
		for _, err := range r.Logs(ctx, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
			if last = err; err == nil {
				cancelled = time.Now()
				cancel()
			}
		}
		must.ErrorIs(t, last, context.Canceled)
		must.Less(t, time.Second, time.Since(cancelled))
	})
	t.Run("may be left by its reader, and takes one place", func(t *testing.T) {
		spec, _ := create(t, r)
		for range 2 {
			for _, err := range r.Logs(patiently(t), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
				must.NoError(t, err)
				break
			}
		}
		must.Eq(t, "begin\n", logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout}))
	})
}

// TestLogs_rotate covers a sandbox that prints much more than Nomad keeps.
func TestLogs_rotate(t *testing.T) {
	t.Parallel()
	const lines = 200_000 // of 16 bytes, in batches that a reader can follow
	r := openShared(t, printing(t, `cd "$BIVOUAC_WORKSPACE"; (until [ -e go ]; do sleep 0.1; done; `+
		`i=0; while [ $i -lt 20 ]; do seq -f 'line %010.0f' $((i*10000+1)) $((i*10000+10000)); sleep 0.2; i=$((i+1)); done) & :`))
	spec, _ := create(t, r)
	must.NoError(t, os.WriteFile(filepath.Join(spec.VolumeHostPath, "go"), nil, 0o600))

	var text strings.Builder
	next := int64(0)
	for chunk, err := range r.Logs(patiently(t), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
		must.NoError(t, err)
		must.LessEq(t, chunk.Offset, next)
		text.Write(chunk.Data)
		next = chunk.Offset + int64(len(chunk.Data))
		if text.Len() == lines*16 {
			break
		}
	}
	for i := range lines {
		must.Eq(t, fmt.Sprintf("line %010d\n", i+1), text.String()[i*16:][:16])
	}

	// An offset means the same byte after older ones were dropped.
	kept := logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout})
	must.Between(t, 512<<10, len(kept), 2<<20)
	must.StrHasSuffix(t, kept, text.String())
	must.Eq(t, "0000200000\n", logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Offset: next - 11}))
	must.Eq(t, "0000200000\n", logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Offset: -11}))
	must.Eq(t, "", logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Offset: next}))
}

// TestLogs_of_200_MB checks that much output does not need much memory, whether its
// reader keeps up or not.
func TestLogs_of_200_MB(t *testing.T) {
	t.Parallel()
	r := openShared(t, printing(t, `yes 0123456 | head -c 209715200; echo; echo end`))
	spec, _ := create(t, r)
	var before, after goruntime.MemStats
	goruntime.ReadMemStats(&before)
	most := uint64(0)
	last := ""
	for chunk, err := range r.Logs(patiently(t), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
		must.NoError(t, err)
		goruntime.ReadMemStats(&after)
		most = max(most, after.HeapAlloc)
		last += string(chunk.Data)
		if last = last[max(0, len(last)-5):]; last == "\nend\n" {
			break
		}
	}
	must.Less(t, before.HeapAlloc+64<<20, most)
}

func TestLogs_when_Nomad_fails(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, printing(t, "echo begin"))
	spec, _ := create(t, r)
	awaitLog(t, r, spec.SessionID, runtime.Stdout, "begin\n")
	const frame = `{"File":"alloc/logs/sandbox.stdout.0","Data":"YmVnaW4K"}`
	for name, test := range map[string]struct {
		status  int
		body    string
		times   int // 0: always
		want    error
		message string
	}{
		"it has too many connections for a moment":       {http.StatusTooManyRequests, "", 2, nil, ""},
		"it does not know yet that the task has started": {http.StatusNotFound, `task "sandbox" not started yet. No logs available`, 2, nil, ""},
		"the task does not start":                        {http.StatusNotFound, `task "sandbox" not started yet. No logs available`, 0, runtime.ErrNotFound, "not started"},
		"the token lacks a right":                        {http.StatusInternalServerError, "Permission denied", 0, runtime.ErrPermission, "read-logs"},
		"the stream breaks":                              {http.StatusOK, frame + `{"Da`, 0, runtime.ErrUnavailable, "unexpected EOF"},
		"the stream ends":                                {http.StatusOK, frame, 0, runtime.ErrUnavailable, "EOF"},
		"a message is too long":                          {http.StatusOK, frame + `{"Data":"` + strings.Repeat("YmVnaW4K", 1<<18), 0, runtime.ErrUnavailable, "unexpected EOF"},
		"the client has no log of the task":              {http.StatusNotFound, `log entry for task "sandbox" and log type "stdout" not found`, 0, runtime.ErrLogsDisabled, "logs"},
		"the allocation was removed":                     {http.StatusNotFound, "Unknown allocation", 0, runtime.ErrNotFound, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			tries := 0
			p.setFault(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				mu.Lock()
				defer mu.Unlock()
				if !strings.HasPrefix(r.URL.Path, "/v1/client/fs/logs/") {
					return false
				}
				if tries++; test.times > 0 && tries > test.times {
					return false
				}
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body)
				return true
			})
			defer p.setFault(nil)
			query := runtime.LogQuery{Stream: runtime.Stdout, Follow: true}
			for chunk, err := range r.Logs(patiently(t), spec.SessionID, query) {
				if err == nil {
					must.Eq(t, "begin\n", string(chunk.Data))
					if test.want == nil {
						break
					}
					continue
				}
				must.ErrorIs(t, err, test.want)
				must.ErrorContains(t, err, test.message)
			}
		})
	}
}

// TestLogs_notice_a_dead_connection covers a Nomad that sends nothing any more, not even
// heartbeats, and says nothing.
func TestLogs_notice_a_dead_connection(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, printing(t, "echo begin"))
	spec, _ := create(t, r)
	p.setFault(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if r.URL.Query().Get("follow") != "true" {
			return false
		}
		_, _ = io.WriteString(w, "{}")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	})
	var last error
	for _, err := range r.Logs(patiently(t), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
		last = err
	}
	must.ErrorIs(t, last, runtime.ErrUnavailable)
	must.ErrorContains(t, last, "no heartbeat")
}

func TestLogs_are_read_by_few_at_a_time(t *testing.T) {
	t.Parallel()
	r := openShared(t, printing(t, "echo begin"))
	spec, _ := create(t, r)
	query := runtime.LogQuery{Stream: runtime.Stdout, Follow: true}
	var open func(n int)
	open = func(n int) {
		for _, err := range r.Logs(patiently(t), spec.SessionID, query) {
			if n == 16 {
				must.ErrorIs(t, err, runtime.ErrUnavailable)
				must.ErrorContains(t, err, "16 logs are being read already")
				return
			}
			must.NoError(t, err)
			open(n + 1)
			return
		}
	}
	open(0)
	must.Eq(t, "begin\n", logText(t, r, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout}))
}
