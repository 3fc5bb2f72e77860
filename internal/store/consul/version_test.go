package consul

import (
	"context"
	"encoding/json"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// upgrade is a scheduler of this version, while other versions write records in
// the same Consul.
type upgrade struct {
	*scheduler.Scheduler
	cluster *cluster
	store   *replica
	driver  *fakeruntime.Driver
	later   atomic.Int64 // how far the clock is ahead, in nanoseconds
}

func newUpgrade(t *testing.T) *upgrade {
	t.Helper()
	c := open(t)
	return schedule(t, c, c.join(t, c.addr))
}

// schedule returns a scheduler over a replica's store.
func schedule(t *testing.T, c *cluster, store *replica) *upgrade {
	t.Helper()
	u := &upgrade{cluster: c, store: store, driver: fakeruntime.New("fake")}
	var err error
	u.Scheduler, err = scheduler.New(scheduler.Config{
		Store: u.store, Locker: u.store,
		Drivers: map[string]runtime.Driver{"fake": u.driver}, DefaultRuntime: "fake",
		TTL: time.Hour, MaxTTL: 3 * time.Hour, CleanupInterval: time.Hour,
		Logger: hclog.NewNullLogger(),
		Meter:  metricnoop.NewMeterProvider().Meter(""), Tracer: tracenoop.NewTracerProvider().Tracer(""),
		Now: func() time.Time { return time.Now().Add(time.Duration(u.later.Load())) },
	})
	must.NoError(t, err)
	return u
}

func (u *upgrade) command(chat uuid.UUID) scheduler.CreateCommand {
	return scheduler.CreateCommand{ChatID: chat, AgentID: "agent-1", VolumeHostPath: "/srv/a", Labels: map[string]string{"ticket": "4711"}}
}

// written creates a session of a new chat and rewrites its record with edit, as
// another version would.
func (u *upgrade) written(t *testing.T, edit func(fields map[string]any)) scheduler.Session {
	t.Helper()
	res, err := u.Create(t.Context(), u.command(uuid.New()))
	must.NoError(t, err)
	u.rewrite(t, res.Session.ChatID, edit)
	return res.Session
}

func (u *upgrade) rewrite(t *testing.T, chat uuid.UUID, edit func(fields map[string]any)) {
	t.Helper()
	fields := u.fields(t, chat)
	edit(fields)
	value, err := json.Marshal(fields)
	must.NoError(t, err)
	u.cluster.set(t, u.store.keys.record(chat), string(value))
}

// value returns the chat's record, or "" if there is none.
func (u *upgrade) value(t *testing.T, chat uuid.UUID) string {
	t.Helper()
	pair, _, err := u.cluster.client.KV().Get(u.store.keys.record(chat), nil)
	must.NoError(t, err)
	if pair == nil {
		return ""
	}
	return string(pair.Value)
}

func (u *upgrade) fields(t *testing.T, chat uuid.UUID) map[string]any {
	t.Helper()
	var fields map[string]any
	must.NoError(t, json.Unmarshal([]byte(u.value(t, chat)), &fields))
	return fields
}

// version1 turns a record into one of version 1.
func version1(fields map[string]any) {
	fields["v"] = 1
	delete(fields, "min_reader")
	delete(fields, "owner")
	delete(fields, "labels")
	delete(fields, "access_token")
}

// version4 turns a record into one of a version 4 that this version may read.
func version4(fields map[string]any) {
	fields["v"] = 4
	fields["tenant"] = map[string]any{"id": "t-1", "quota": map[string]any{"cpu": 4.0}}
	fields["endpoint"].(map[string]any)["tls"] = map[string]any{"name": "sandbox.internal"}
}

// TestRecordOfAnotherVersion takes a record of another version through all
// operations. Each write gives it the higher of the two versions and keeps the
// fields that this version does not know.
func TestRecordOfAnotherVersion(t *testing.T) {
	for name, version := range map[string]struct {
		write     func(fields map[string]any)
		rewritten float64 // the record's version after this version wrote it
		labels    map[string]string
		owner     string
		hasToken  bool
		tenant    any
		tls       any
	}{
		"an_older_one": {write: version1, rewritten: 3, owner: scheduler.DefaultOwner},
		"a_newer_one": {
			write: version4, rewritten: 4,
			labels: map[string]string{"ticket": "4711"}, owner: scheduler.DefaultOwner, hasToken: true,
			tenant: map[string]any{"id": "t-1", "quota": map[string]any{"cpu": 4.0}}, tls: map[string]any{"name": "sandbox.internal"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpgrade(t)
			// asRead returns a session as its record has it.
			asRead := func(session scheduler.Session) scheduler.Session {
				session.Labels, session.Owner = version.labels, version.owner
				if !version.hasToken {
					session.AccessToken = ""
				}
				return session
			}
			mustBeKept := func(t *testing.T, state scheduler.State, fields map[string]any) {
				t.Helper()
				must.Eq(t, version.rewritten, fields["v"].(float64))
				must.Eq(t, float64(minReader), fields["min_reader"].(float64))
				must.Eq(t, string(state), fields["state"].(string))
				must.Eq(t, version.owner, fields["owner"].(string))
				must.Eq(t, version.tenant, fields["tenant"])
				must.Eq(t, version.tls, fields["endpoint"].(map[string]any)["tls"])
			}
			// atStop returns a map that receives the session's record as it is
			// when the driver is asked to stop or delete the sandbox.
			atStop := func(t *testing.T, session scheduler.Session) map[string]any {
				t.Helper()
				fields := make(map[string]any)
				u.driver.Intercept(func(_ context.Context, call fakeruntime.Call) error {
					if call.SessionID != session.SessionID.String() || call.Op != fakeruntime.OpStop && call.Op != fakeruntime.OpDelete {
						return nil
					}
					pair, _, err := u.cluster.client.KV().Get(u.store.keys.record(session.ChatID), nil)
					if err != nil {
						return err
					}
					return json.Unmarshal(pair.Value, &fields)
				})
				t.Cleanup(func() { u.driver.Intercept(nil) })
				return fields
			}

			t.Run("is_read_and_reused_as_it_is", func(t *testing.T) {
				session := asRead(u.written(t, version.write))
				before := u.value(t, session.ChatID)
				read, _, err := u.Get(t.Context(), session.ChatID, scheduler.Block{})
				must.NoError(t, err)
				must.Eq(t, session, read)
				again := u.command(session.ChatID)
				again.Labels = nil
				res, err := u.Create(t.Context(), again)
				must.NoError(t, err)
				must.Eq(t, scheduler.CreateResult{Result: scheduler.ResultReused, Session: session}, res)
				must.Eq(t, before, u.value(t, session.ChatID))
			})
			t.Run("is_renewed", func(t *testing.T) {
				session := asRead(u.written(t, version.write))
				for ttl := 2 * time.Hour; ttl <= 3*time.Hour; ttl += time.Hour {
					renewed, err := u.Renew(t.Context(), session.ChatID, ttl)
					must.NoError(t, err)
					mustBeKept(t, scheduler.StateRunning, u.fields(t, session.ChatID))
					session.ExpiresAt = renewed.ExpiresAt
					must.Eq(t, session, renewed)
				}
				// A newer version continues from what this one wrote.
				u.rewrite(t, session.ChatID, func(fields map[string]any) { fields["v"], fields["tenant"] = 5, "moved" })
				u.later.Add(int64(time.Minute))
				_, err := u.Renew(t.Context(), session.ChatID, 3*time.Hour)
				must.NoError(t, err)
				must.Eq(t, "moved", u.fields(t, session.ChatID)["tenant"].(string))
				must.Eq(t, 5.0, u.fields(t, session.ChatID)["v"].(float64))
			})
			t.Run("is_cleaned_up", func(t *testing.T) {
				session := u.written(t, version.write)
				stopping := atStop(t, session)
				u.later.Add(int64(61 * time.Minute))
				res, err := u.CleanupExpired(t.Context())
				must.NoError(t, err)
				must.Eq(t, 0, res.ErrorCount)
				mustBeKept(t, scheduler.StateStopping, stopping)
				must.Eq(t, "", u.value(t, session.ChatID))
			})
			t.Run("is_deleted", func(t *testing.T) {
				session := u.written(t, version.write)
				stopping := atStop(t, session)
				res, err := u.Delete(t.Context(), session.ChatID)
				must.NoError(t, err)
				must.Eq(t, session.SessionID, res.SessionID)
				mustBeKept(t, scheduler.StateStopping, stopping)
				must.Eq(t, "", u.value(t, session.ChatID))
			})
			t.Run("passes_nothing_on_to_the_session_that_replaces_it", func(t *testing.T) {
				session := u.written(t, version.write)
				stopping := atStop(t, session)
				u.driver.Kill(session.SessionID.String(), "killed")
				again := u.command(session.ChatID)
				again.Labels = nil
				res, err := u.Create(t.Context(), again)
				must.NoError(t, err)
				must.Eq(t, scheduler.ResultReplaced, res.Result)
				mustBeKept(t, scheduler.StateStopping, stopping)
				fields := u.fields(t, session.ChatID)
				must.Eq(t, float64(recordVersion), fields["v"].(float64))
				must.MapNotContainsKey(t, fields, "tenant")
				must.MapNotContainsKey(t, fields["endpoint"].(map[string]any), "tls")
				must.Nil(t, fields["labels"])
			})
		})
	}
}

// TestRecordThatOnlyANewerVersionMayRead checks that a record that only a newer
// version may read, and its sandbox, are left alone by every operation.
func TestRecordThatOnlyANewerVersionMayRead(t *testing.T) {
	u := newUpgrade(t)
	session := u.written(t, func(fields map[string]any) {
		version4(fields)
		fields["min_reader"] = 4
		fields["agent_id"] = map[string]any{"of": "another form"}
	})
	inFlight := u.written(t, func(fields map[string]any) {
		fields["v"], fields["min_reader"], fields["state"] = 4, 4, "resting"
	})
	u.cluster.set(t, u.store.keys.flight()+inFlight.ChatID.String(), "stopping")
	before := u.value(t, session.ChatID)
	chat := session.ChatID
	u.later.Store(int64(2 * time.Hour)) // it has expired, according to the index

	for name, use := range map[string]func(ctx context.Context) error{
		"create": func(ctx context.Context) error { _, err := u.Create(ctx, u.command(chat)); return err },
		"get":    func(ctx context.Context) error { _, _, err := u.Get(ctx, chat, scheduler.Block{}); return err },
		"renew":  func(ctx context.Context) error { _, err := u.Renew(ctx, chat, time.Hour); return err },
		"delete": func(ctx context.Context) error { _, err := u.Delete(ctx, chat); return err },
		"repair": func(ctx context.Context) error { _, err := u.Repair(ctx, chat); return err },
	} {
		t.Run(name+"_fails", func(t *testing.T) {
			err := use(t.Context())
			must.ErrorIs(t, err, scheduler.ErrNewerRecord)
			must.Eq(t, "newer_record", scheduler.Kind(err))
		})
	}
	t.Run("cleanup_and_settling_pass_over_it", func(t *testing.T) {
		other := u.written(t, func(map[string]any) {})
		u.later.Add(int64(2 * time.Hour))
		cleaned, err := u.CleanupExpired(t.Context())
		must.NoError(t, err)
		must.Eq(t, 0, cleaned.ErrorCount)
		must.Len(t, 1, cleaned.Cleaned)
		must.Eq(t, other.ChatID, cleaned.Cleaned[0].ChatID)
		must.NoError(t, u.SettleInFlight(t.Context()))
	})
	t.Run("a_list_names_it_beside_its_page", func(t *testing.T) {
		page, err := u.List(t.Context(), scheduler.Query{PerPage: 10})
		must.NoError(t, err)
		must.SliceEmpty(t, page.Sessions)
		must.Len(t, 2, page.Damaged)
		for _, record := range page.Damaged {
			must.ErrorIs(t, record.Err, scheduler.ErrNewerRecord)
		}
	})
	t.Run("its_sandbox_is_not_adopted", func(t *testing.T) {
		res, err := u.Adopt(t.Context())
		must.NoError(t, err)
		must.SliceEmpty(t, res.Adopted)
		must.SliceEmpty(t, res.Left)
	})
	must.Eq(t, before, u.value(t, chat))
	must.True(t, u.cluster.has(t, u.store.keys.flight()+inFlight.ChatID.String()))
	must.False(t, u.cluster.has(t, u.store.keys.lock(chat)), must.Sprint("no lock is left behind"))
	for _, s := range []scheduler.Session{session, inFlight} {
		sandbox, err := u.driver.Inspect(t.Context(), s.SessionID.String())
		must.NoError(t, err)
		must.Eq(t, runtime.StateRunning, sandbox.State)
	}
}
