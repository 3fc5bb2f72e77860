package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/scheduler"
)

var (
	chat = uuid.MustParse("00000000-0000-4000-8000-00000000000a")
	ann  = scheduler.Caller{
		Name: "ann", Method: "jwt/nomad", Accessor: "jti-1", Address: "192.0.2.1:1234",
		Policies: []*scheduler.Policy{{Name: "support"}, {Name: "ops"}},
	}
	session = scheduler.Session{
		SessionID: uuid.MustParse("00000000-0000-4000-8000-000000000001"), ChatID: chat, AgentID: "support-1",
		VolumeHostPath: "/srv/a", Runtime: "nomad", ContainerID: "job-1", Owner: "ann", State: scheduler.StateRunning,
	}
)

// disk is a sink's standard output that may be full.
type disk struct {
	bytes.Buffer
	full bool
}

func (d *disk) Write(p []byte) (int, error) {
	if d.full {
		return 0, syscall.ENOSPC
	}
	return d.Buffer.Write(p)
}

// world is a log with one sink on a disk, and what it reports.
type world struct {
	*audit.Log
	disk disk
	sink *audit.Sink
	logs bytes.Buffer
	lost int
}

func newWorld(t *testing.T, enforced bool) *world {
	t.Helper()
	w := &world{}
	var err error
	w.sink, err = audit.Open(audit.Settings{Name: "disk", Path: audit.Stdout, Enforced: enforced}, &w.disk)
	must.NoError(t, err)
	w.Log = audit.New(audit.Config{
		Sinks: []*audit.Sink{w.sink}, Node: "node-1", Lost: func(string) { w.lost++ },
		Logger: hclog.New(&hclog.LoggerOptions{Output: &w.logs, Level: hclog.Debug, DisableTime: true}),
	})
	return w
}

// lines returns the lines as JSON, without what differs each time.
func (w *world) lines(t *testing.T) []string {
	t.Helper()
	var lines []string
	for text := range strings.Lines(w.disk.String()) {
		var line map[string]any
		must.NoError(t, json.Unmarshal([]byte(text), &line))
		payload, ok := line["payload"].(map[string]any)
		must.True(t, ok)
		must.NotEq(t, "", line["created_at"])
		must.Eq(t, line["created_at"], payload["timestamp"])
		_, err := uuid.Parse(payload["id"].(string))
		must.NoError(t, err)
		for _, key := range []string{"id", "timestamp"} {
			delete(payload, key)
		}
		must.Eq(t, "audit", line["event_type"])
		short, err := json.Marshal(payload)
		must.NoError(t, err)
		lines = append(lines, string(short))
	}
	w.disk.Reset()
	return lines
}

func put() *audit.Operation {
	return &audit.Operation{
		Caller: ann, RequestID: "r1", Method: "PUT", Endpoint: "/v1/sessions/{chat_id}", ChatID: chat, UserAgent: "curl/8",
	}
}

const (
	annsAuth = `"auth":{"accessor_id":"jti-1","method":"jwt/nomad","name":"ann","policies":["support","ops"]}`
	meta     = `"request_meta":{"remote_address":"192.0.2.1:1234","user_agent":"curl/8"}`
	asked    = `"request":{"chat_id":"00000000-0000-4000-8000-00000000000a","endpoint":"/v1/sessions/{chat_id}","id":"r1","operation":"PUT",` + meta + `}`
	asked1   = `"request":{"agent_id":"support-1","chat_id":"00000000-0000-4000-8000-00000000000a","endpoint":"/v1/sessions/{chat_id}","id":"r1","operation":"PUT",` + meta + `}`
	made     = `{"agent_id":"support-1","container_id":"job-1","owner":"ann","runtime":"nomad","session_id":"00000000-0000-4000-8000-000000000001","volume_host_path":"/srv/a"}`
)

func TestOperation(t *testing.T) {
	t.Run("has a line when it begins and one when it ends", func(t *testing.T) {
		w := newWorld(t, true)
		op := put()
		ctx, err := w.Begin(t.Context(), op)
		must.NoError(t, err)
		must.Eq(t, []string{`{` + annsAuth + `,"node":"node-1",` + asked + `,"stage":"OperationReceived","type":"audit","version":1}`}, w.lines(t))

		w.Note(ctx, scheduler.Event{Type: scheduler.EventCreated, After: &session, Asked: &scheduler.CreateCommand{AgentID: "support-1"}})
		op.Status = 201
		w.End(op)
		must.Eq(t, []string{`{` + annsAuth + `,"node":"node-1",` + asked1 + `,"response":{"result":"created","status_code":201},"session":` + made +
			`,"stage":"OperationComplete","type":"audit","version":1}`}, w.lines(t))
	})

	t.Run("names the session that it replaced", func(t *testing.T) {
		w := newWorld(t, true)
		op := put()
		ctx, err := w.Begin(t.Context(), op)
		must.NoError(t, err)
		old := session
		old.SessionID = uuid.New()
		w.Note(ctx, scheduler.Event{Type: scheduler.EventCreated, Before: &old, After: &session})
		must.Eq(t, "replaced", op.Result)
		must.Eq(t, session.SessionID, op.Session.SessionID)
		must.Eq(t, old.SessionID, op.Previous.SessionID)
	})

	t.Run("is not told about other sessions", func(t *testing.T) {
		w := newWorld(t, true)
		op := put()
		ctx, err := w.Begin(t.Context(), op)
		must.NoError(t, err)
		w.Note(ctx, scheduler.Event{Type: scheduler.EventOrphanStopped, Before: &session})
		must.Nil(t, op.Session)
		w.Note(t.Context(), scheduler.Event{Type: scheduler.EventCreated, After: &session}) // of no operation
		must.Nil(t, op.Session)
	})

	t.Run("clips texts of strangers", func(t *testing.T) {
		w := newWorld(t, true)
		op := put()
		op.Method, op.UserAgent, op.Caller.Name = strings.Repeat("M", 1<<16), strings.Repeat("ü", 1<<16), "\n\x00\xff\u2028"
		w.End(op)
		must.Less(t, 4096, len(w.disk.String()))
		must.Len(t, 1, w.lines(t))
	})
}

func TestAttempt(t *testing.T) {
	for name, tc := range map[string]struct {
		event     scheduler.EventType
		operation string
	}{
		"expiry":         {scheduler.EventExpired, "expire"},
		"settling":       {scheduler.EventSettled, "settle"},
		"adoption":       {scheduler.EventAdopted, "adopt"},
		"stop of orphan": {scheduler.EventOrphanStopped, "stop_orphan"},
		"death":          {scheduler.EventDead, "record"},
		"loss":           {scheduler.EventLost, "record"},
		"return":         {scheduler.EventRunning, "record"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, true)
			e := scheduler.Event{Type: tc.event, ChatID: chat, Before: &session, Caller: scheduler.Caller{Name: "bivouac"}}
			done, err := w.Attempt(t.Context(), e)
			must.NoError(t, err)
			about := `{"auth":{"name":"bivouac"},"node":"node-1","request":{"chat_id":"00000000-0000-4000-8000-00000000000a","operation":"` + tc.operation + `"},`
			must.Eq(t, []string{about + `"session":` + made + `,"stage":"OperationReceived","type":"audit","version":1}`}, w.lines(t))
			done(nil)
			must.Eq(t, []string{about + `"response":{"result":"` + string(tc.event) + `"},"session":` + made + `,"stage":"OperationComplete","type":"audit","version":1}`}, w.lines(t))
			done(scheduler.ErrLockLost)
			must.StrContains(t, w.lines(t)[0], `"response":{"error":"lock_lost","result":"error"}`)
		})
	}

	t.Run("names the caller whose request it serves", func(t *testing.T) {
		w := newWorld(t, true)
		_, err := w.Attempt(t.Context(), scheduler.Event{Type: scheduler.EventExpired, ChatID: chat, Before: &session, Caller: ann, RequestID: "r7"})
		must.NoError(t, err)
		line := w.lines(t)[0]
		must.StrContains(t, line, `"name":"ann"`)
		must.StrContains(t, line, `"id":"r7"`)
		must.StrContains(t, line, `"remote_address":"192.0.2.1:1234"`)
	})
}

func TestFullDisk(t *testing.T) {
	expired := scheduler.Event{Type: scheduler.EventExpired, ChatID: chat, Before: &session}

	t.Run("enforced: nothing may begin", func(t *testing.T) {
		w := newWorld(t, true)
		w.disk.full = true
		_, err := w.Begin(t.Context(), put())
		must.ErrorIs(t, err, scheduler.ErrAuditUnavailable)
		must.ErrorIs(t, err, syscall.ENOSPC)
		_, err = w.Attempt(t.Context(), expired)
		must.ErrorIs(t, err, scheduler.ErrAuditUnavailable)
		must.Eq(t, 2, w.lost)
	})

	t.Run("best-effort: everything goes on", func(t *testing.T) {
		w := newWorld(t, false)
		w.disk.full = true
		_, err := w.Begin(t.Context(), put())
		must.NoError(t, err)
		done, err := w.Attempt(t.Context(), expired)
		must.NoError(t, err)
		done(nil)
		w.End(put())
		must.Eq(t, 4, w.lost)
	})

	t.Run("the log and health say so until a line is written", func(t *testing.T) {
		w := newWorld(t, true)
		must.NoError(t, w.Health(w.sink))
		w.disk.full = true
		for range 3 {
			_, err := w.Begin(t.Context(), put())
			must.Error(t, err)
		}
		must.ErrorIs(t, w.Health(w.sink), syscall.ENOSPC)
		must.Eq(t, 1, strings.Count(w.logs.String(), `[WARN]  audit_failed: sink=disk error="audit \"disk\": no space left on device"`))

		w.disk.full = false
		_, err := w.Begin(t.Context(), put())
		must.NoError(t, err)
		must.NoError(t, w.Health(w.sink))
		must.StrContains(t, w.logs.String(), "audit_recovered: sink=disk lost=3")
		lines := w.lines(t)
		must.Len(t, 2, lines)
		must.StrContains(t, lines[0], `"gap":{"lost":3,"since":"`)
		must.StrContains(t, lines[1], `"stage":"OperationReceived"`)
	})

	t.Run("health finds out that there is room again", func(t *testing.T) {
		w := newWorld(t, true)
		w.disk.full = true
		_, err := w.Begin(t.Context(), put())
		must.Error(t, err)
		w.disk.full = false
		must.NoError(t, w.Health(w.sink))
		must.NoError(t, w.Health(w.sink))
		must.Len(t, 1, w.lines(t))
	})

	t.Run("one full sink does not keep the line from another", func(t *testing.T) {
		full, good := newWorld(t, true), newWorld(t, true)
		full.disk.full = true
		log := newLog(full.sink, good.sink)
		_, err := log.Begin(t.Context(), put())
		must.ErrorIs(t, err, scheduler.ErrAuditUnavailable)
		must.Len(t, 1, good.lines(t))
	})

	t.Run("a device that is full", func(t *testing.T) {
		_, err := newLog(open(t, settings("/dev/full"))).Begin(t.Context(), put())
		must.ErrorIs(t, err, syscall.ENOSPC)
	})
}

func TestReplicasWriteTheirOwnFiles(t *testing.T) {
	var lines [2][]string
	for i := range lines {
		path := filepath.Join(t.TempDir(), "audit.log")
		write(t, open(t, settings(path)), i)
		lines[i] = read(t, path)
	}
	must.Eq(t, [2][]string{{"0"}, {"1"}}, lines)
}

func TestRefusedRequestsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, true)
		refused := func() *audit.Operation {
			return &audit.Operation{Caller: scheduler.Caller{Name: "anonymous"}, Method: "GET", Endpoint: "/v1/sessions", Status: 401, Error: "unauthenticated"}
		}
		for range 10_000 {
			w.Refuse(refused())
		}
		must.Len(t, 100, w.lines(t))

		time.Sleep(time.Second)
		w.Refuse(refused())
		lines := w.lines(t)
		must.Len(t, 1, lines)
		must.StrContains(t, lines[0], `"omitted":9900`)
		must.StrContains(t, lines[0], `"response":{"error":"unauthenticated","status_code":401}`)

		time.Sleep(time.Hour)
		w.Refuse(refused())
		must.StrNotContains(t, w.lines(t)[0], "omitted")
	})
}

// BenchmarkOperation measures both lines of an operation on a real file.
func BenchmarkOperation(b *testing.B) {
	sink, err := audit.Open(settings(filepath.Join(b.TempDir(), "audit.log")), nil)
	must.NoError(b, err)
	log := newLog(sink)
	for b.Loop() {
		op := put()
		if _, err := log.Begin(context.Background(), op); err != nil {
			b.Fatal(err)
		}
		op.Session = &session
		log.End(op)
	}
	must.NoError(b, sink.Close())
}
