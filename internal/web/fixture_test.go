package web_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/internal/web"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// fixture is the API in this process, over records that a test writes as it likes.
type fixture struct {
	t      *testing.T
	url    string
	locker *memory.Locker
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	store := memory.NewStore()
	locker := memory.NewLocker(store)
	sessions, err := scheduler.New(scheduler.Config{
		Store: store, Locker: locker,
		Drivers:        map[string]runtime.Driver{"fake": fakeruntime.New("fake")},
		DefaultRuntime: "fake", TTL: time.Hour, MaxTTL: time.Hour, CleanupInterval: time.Minute,
		Logger: hclog.NewNullLogger(), Meter: metricnoop.Meter{}, Tracer: tracenoop.Tracer{}, Now: time.Now,
	})
	must.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background()) // it ends with the server
	var background sync.WaitGroup
	background.Go(func() { sessions.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		background.Wait()
	})
	handler := api.New(api.Config{
		Sessions: sessions, Instance: func() string { return "fixture" }, Logger: hclog.NewNullLogger(), UI: web.Handler(),
		Metrics:  http.NotFoundHandler(),
		Runtimes: func(context.Context) []wire.Runtime { return nil },
		Refused:  func(context.Context, string) {},
	})
	server := httptest.NewServer(handler)
	server.Config.RegisterOnShutdown(handler.Stop)
	t.Cleanup(func() {
		handler.Stop()
		server.CloseClientConnections()
		server.Close()
	})
	return &fixture{t: t, url: server.URL, locker: locker}
}

// put writes the record of a session, with the fields that change sets.
func (f *fixture) put(change func(*scheduler.Session)) scheduler.Session {
	f.t.Helper()
	now := time.Now().UTC()
	s := scheduler.Session{
		SessionID: uuid.New(), ChatID: uuid.New(), AgentID: "helper", VolumeHostPath: "/srv/a", Runtime: "fake", ContainerID: "c1",
		Endpoint:  runtime.Endpoint{IP: netip.MustParseAddr("10.0.3.7"), Port: 25017},
		CreatedAt: now, ExpiresAt: now.Add(time.Hour), State: scheduler.StateDead, Reason: "exit code 1", Owner: "anonymous",
	}
	change(&s)
	lease, err := f.locker.Lock(f.t.Context(), s.ChatID, 0)
	must.NoError(f.t, err)
	must.NoError(f.t, lease.Write(f.t.Context(), &s, scheduler.Release, scheduler.Change{
		Type: scheduler.ChangeCreated, Time: now, ChatID: s.ChatID, SessionID: s.SessionID, AgentID: s.AgentID,
	}))
	return s
}

// fill writes the records of n sessions.
func (f *fixture) fill(n int) {
	f.t.Helper()
	for i := range n {
		f.put(func(s *scheduler.Session) {
			s.AgentID, s.Labels = fmt.Sprintf("agent-%d", i%100), map[string]string{"ticket": fmt.Sprint(i)}
		})
	}
}
