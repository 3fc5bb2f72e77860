package consul

import (
	"bytes"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// logged makes the replica log into the returned buffer.
func logged(r *replica) *bytes.Buffer {
	var buffer bytes.Buffer
	r.log = hclog.New(&hclog.LoggerOptions{Output: &buffer})
	return &buffer
}

func (c *cluster) set(t *testing.T, key, value string) {
	t.Helper()
	_, err := c.client.KV().Put(&api.KVPair{Key: key, Value: []byte(value)}, nil)
	must.NoError(t, err)
}

func (c *cluster) has(t *testing.T, key string) bool {
	t.Helper()
	pair, _, err := c.client.KV().Get(key, nil)
	must.NoError(t, err)
	return pair != nil
}

func TestDamagedRecordsAreSkippedInListsAndReportedToWhoAsksForThem(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	good, damaged := freshSession(), freshSession()
	good.ExpiresAt, damaged.ExpiresAt = good.CreatedAt, good.CreatedAt
	good.State, damaged.State = scheduler.StateStopping, scheduler.StateStopping
	put(t, r, good)
	put(t, r, damaged)
	c.set(t, r.keys.record(damaged.ChatID), `{"v":2}`)
	c.set(t, r.keys.shard(0)+"not-a-chat", "x")
	misplaced, _, err := encodeRecord(freshSession(), "write-1", nil)
	must.NoError(t, err)
	c.set(t, r.keys.shard(0)+uuid.NewString(), string(misplaced))

	log := logged(r)
	all, err := r.List(t.Context(), scheduler.Query{PerPage: 10})
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{good}, all.Sessions)
	for _, told := range []string{r.keys.record(damaged.ChatID), "min_reader missing", "not-a-chat"} {
		must.StrContains(t, log.String(), told)
	}
	agents, err := r.List(t.Context(), scheduler.Query{AgentID: good.AgentID, PerPage: 10})
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{good}, agents.Sessions)
	expired, err := r.Expired(t.Context(), good.ExpiresAt, 10)
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{good}, expired)
	inFlight, err := r.InFlight(t.Context())
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{good}, inFlight)

	_, _, err = r.Get(t.Context(), damaged.ChatID, scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrDamaged)
	must.ErrorContains(t, err, r.keys.record(damaged.ChatID))
	for range 2 { // the failed call leaves no lock
		_, err = r.Lock(t.Context(), damaged.ChatID, 0)
		must.ErrorIs(t, err, scheduler.ErrDamaged)
		must.False(t, c.has(t, r.keys.lock(damaged.ChatID)))
	}
	// Its index entries may be correct, so they stay.
	must.True(t, c.has(t, r.keys.flight()+damaged.ChatID.String()))
}

func TestIndexEntriesThatNoRecordHasAreRemoved(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	session := freshSession()
	put(t, r, session)
	bucket := bucketOf(session.ExpiresAt.Add(-time.Hour))
	stale := []string{
		r.keys.agent("agent-1") + uuid.NewString(),
		r.keys.agent("another") + session.ChatID.String(),
		r.keys.bucket(bucket) + uuid.NewString(),
		r.keys.bucket(bucket) + session.ChatID.String(),
		r.keys.flight() + session.ChatID.String(),
		r.keys.flight() + uuid.NewString(),
	}
	for _, key := range stale {
		c.set(t, key, "")
	}

	log := logged(r)
	for _, agent := range []string{"agent-1", "another"} {
		_, err := r.List(t.Context(), scheduler.Query{AgentID: agent, PerPage: 10})
		must.NoError(t, err)
	}
	expired, err := r.Expired(t.Context(), session.ExpiresAt.Add(-time.Minute), 10)
	must.NoError(t, err)
	must.SliceEmpty(t, expired)
	inFlight, err := r.InFlight(t.Context())
	must.NoError(t, err)
	must.SliceEmpty(t, inFlight)
	for _, key := range stale {
		must.False(t, c.has(t, key), must.Sprint(key))
		must.StrContains(t, log.String(), key)
	}

	// The record's own entries are unchanged.
	agents, err := r.List(t.Context(), scheduler.Query{AgentID: "agent-1", PerPage: 10})
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{session}, agents.Sessions)
	expired, err = r.Expired(t.Context(), session.ExpiresAt, 10)
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{session}, expired)
}

// TestRecordWhoseIndexEntriesAreGone covers a record whose index entries were
// deleted. It can still be listed and locked, the next write restores the
// entries, and deleting the record leaves nothing.
func TestRecordWhoseIndexEntriesAreGone(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	session := freshSession()
	put(t, r, session)
	indexes := []string{
		r.keys.agent(session.AgentID) + session.ChatID.String(),
		r.keys.bucket(bucketOf(session.ExpiresAt)) + session.ChatID.String(),
	}
	for _, key := range indexes {
		_, err := c.client.KV().Delete(key, nil)
		must.NoError(t, err)
	}
	all, err := r.List(t.Context(), scheduler.Query{PerPage: 10})
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{session}, all.Sessions)

	lease := lock(t, r, session.ChatID)
	must.NoError(t, lease.Write(t.Context(), &session, scheduler.Keep))
	for _, key := range indexes {
		must.True(t, c.has(t, key), must.Sprint(key))
		_, err := c.client.KV().Delete(key, nil)
		must.NoError(t, err)
	}
	must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))
	c.MustBeEmpty(t)
}

// TestKeysThatAreNobodys checks that foreign keys in the places of records,
// index entries, locks and the time do no harm.
func TestKeysThatAreNobodys(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	session := freshSession()
	session.ExpiresAt = session.CreatedAt
	strangers := []string{
		r.keys.shard(0) + "x/y", r.keys.agent(session.AgentID) + "x", r.keys.bucket("tomorrow") + "x",
		r.keys.bucket(bucketOf(session.ExpiresAt)) + "x", r.keys.flight() + "x",
	}
	for _, key := range strangers {
		c.set(t, key, "\x00")
	}
	c.set(t, r.keys.changed(), "\x00")
	c.set(t, r.keys.lock(session.ChatID), "a lock that no session holds")

	put(t, r, session)
	log := logged(r)
	for _, query := range []scheduler.Query{{PerPage: 10}, {PerPage: 10, AgentID: session.AgentID}} {
		page, err := r.List(t.Context(), query)
		must.NoError(t, err)
		must.Eq(t, []scheduler.Session{session}, page.Sessions)
	}
	expired, err := r.Expired(t.Context(), session.ExpiresAt, 10)
	must.NoError(t, err)
	must.Eq(t, []scheduler.Session{session}, expired)
	_, err = r.InFlight(t.Context())
	must.NoError(t, err)
	_, err = r.Count(t.Context())
	must.NoError(t, err)
	for _, key := range strangers {
		must.True(t, c.has(t, key), must.Sprint(key))
		if key != r.keys.bucket("tomorrow")+"x" { // nobody reads this folder before its time
			must.StrContains(t, log.String(), key)
		}
	}
}

// TestRecordThatMovesOnIsNotRepaired covers a record that changes while it is
// compared with an index entry. The entry is then not touched.
func TestRecordThatMovesOnIsNotRepaired(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	session := freshSession()
	put(t, r, session)
	entry := r.keys.bucket(bucketOf(session.ExpiresAt)) + session.ChatID.String()
	seen := &api.KVPair{Key: r.keys.record(session.ChatID)} // as if it had not existed yet
	must.NoError(t, r.repair(t.Context(), entry, seen))
	must.True(t, c.has(t, entry))
}

func TestLookingForTheExpiredCostsWhatExpired(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	now := testSession().CreatedAt
	for i := range 60 { // they are valid, each expiring in a different minute
		session := freshSession()
		session.ExpiresAt = now.Add(time.Duration(i+1) * time.Minute)
		put(t, direct, session)
	}
	expired := func(at time.Time, limit int) int {
		t.Helper()
		sessions, err := proxied.Expired(t.Context(), at, limit)
		must.NoError(t, err)
		return len(sessions)
	}
	// requests returns how many requests listed minutes, and how many others there were.
	requests := func() (lists, others int) {
		for _, kind := range p.kinds() {
			if kind == "keys" {
				lists++
			} else {
				others++
			}
		}
		return lists, others
	}
	_ = p.kinds()
	must.Eq(t, 0, expired(now, 100))
	lists, others := requests()
	must.Between(t, 1, lists, 12*9)
	must.Eq(t, 1, others)
	must.MapEmpty(t, later(proxied.buckets.known, now), must.Sprint("minutes of the future are not listed"))
	must.Eq(t, 0, expired(now, 100))
	must.Eq(t, []string{"read txn"}, p.kinds())

	must.Eq(t, 5, expired(now.Add(5*time.Minute), 100))
	must.Eq(t, []string{"read txn", "read txn"}, p.kinds()) // one for the minutes and one for the records
	must.Eq(t, 5, expired(now.Add(time.Hour), 5))           // a jump
	_, others = requests()
	must.LessEq(t, 2, others)
	must.Eq(t, 60, expired(now.Add(time.Hour), 100))
	must.LessEq(t, 5+5, len(p.kinds()))
	must.Eq(t, 60, expired(now.Add(48*time.Hour), 100)) // after a long time
}

// later returns the minutes after a time.
func later(minutes map[string]struct{}, now time.Time) map[string]struct{} {
	minutes = maps.Clone(minutes)
	maps.DeleteFunc(minutes, func(minute string, _ struct{}) bool { return minute <= bucketOf(now) })
	return minutes
}

func TestMinutesOfThePastAreThoseUpToNow(t *testing.T) {
	now := time.Date(2026, 10, 9, 23, 5, 0, 0, time.UTC)
	prefixes := upTo(bucketOf(now))
	for ago, want := range map[time.Duration]bool{
		0: true, time.Minute: true, 6 * time.Minute: true, 24 * time.Hour: true, 400 * 24 * time.Hour: true, 20_000 * 24 * time.Hour: true,
		-time.Minute: false, -10 * time.Minute: false, -time.Hour: false, -24 * time.Hour: false, -400 * 24 * time.Hour: false,
	} {
		covers := func(prefix string) bool { return strings.HasPrefix(bucketOf(now.Add(-ago)), prefix) }
		must.Eq(t, want, slices.ContainsFunc(prefixes, covers), must.Sprint(ago))
	}
}

// TestClocksMayBeApart covers a replica whose clock is behind, so that it
// writes into minutes that others have already seen empty. The others still
// find what expires there.
func TestClocksMayBeApart(t *testing.T) {
	c := open(t)
	r, behind := c.join(t, c.addr), c.join(t, c.addr)
	now := testSession().CreatedAt
	find := func() []scheduler.Session {
		t.Helper()
		sessions, err := r.Expired(t.Context(), now, 10)
		must.NoError(t, err)
		return sessions
	}
	must.SliceEmpty(t, find())

	early := freshSession()
	early.ExpiresAt = now.Add(-lookBack)
	put(t, behind, early)
	must.Eq(t, []scheduler.Session{early}, find())

	// If the clocks differ by more than that, it takes until the next listing.
	earlier := freshSession()
	earlier.ExpiresAt = now.Add(-10 * lookBack)
	put(t, behind, earlier)
	must.Eq(t, []scheduler.Session{early}, find())
	r.buckets.listed = time.Now().Add(-relist)
	must.Eq(t, []scheduler.Session{earlier, early}, find())
}

func TestAPageOfFewRecordsTakesFewRequests(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	for range 10 {
		put(t, direct, freshSession())
	}
	_ = p.kinds()
	page, err := proxied.List(t.Context(), scheduler.Query{PerPage: 1000})
	must.NoError(t, err)
	must.Len(t, 10, page.Sessions)
	must.LessEq(t, 6, len(p.kinds()))
}

func TestNoListIsLoadedWhole(t *testing.T) {
	_, direct, proxied, p := behindProxy(t)
	for range 600 {
		put(t, direct, freshSession())
	}
	_ = p.kinds()
	page, err := proxied.List(t.Context(), scheduler.Query{PerPage: 2})
	must.NoError(t, err)
	must.Len(t, 2, page.Sessions)
	must.NotEq(t, "", page.NextToken)
	must.LessEq(t, scheduler.Shards/4, p.trees())
}

// TestManyRecordsAreCountedInParts covers counts of stores of different sizes. The keys of
// the first shard say how large a store is.
func TestManyRecordsAreCountedInParts(t *testing.T) {
	for _, tc := range []struct {
		inFirstShard int
		most         int // requests that list keys, for all records
	}{{1, 2}, {20, 1 + 16}, {300, 1 + scheduler.Shards}} {
		t.Run(strconv.Itoa(tc.inFirstShard), func(t *testing.T) {
			c, direct, proxied, p := behindProxy(t)
			for _, agent := range []string{"agent-1", "agent-1", "agent-2"} {
				session := freshSession()
				for shardOf(session.ChatID) == 0 {
					session.ChatID = uuid.New()
				}
				session.AgentID = agent
				put(t, direct, session)
			}
			creating := freshSession()
			creating.AgentID, creating.State = "agent-3", scheduler.StateCreating
			for shardOf(creating.ChatID) == 0 {
				creating.ChatID = uuid.New()
			}
			put(t, direct, creating)
			for chunk := range slices.Chunk(make([]struct{}, tc.inFirstShard), 100) {
				var ops api.TxnOps
				for range chunk {
					ops = append(ops, &api.TxnOp{KV: &api.KVTxnOp{Verb: api.KVSet, Key: direct.keys.shard(0) + uuid.NewString()}})
				}
				ok, _, _, err := c.client.Txn().Txn(ops, nil)
				must.NoError(t, err)
				must.True(t, ok)
			}

			_ = p.kinds()
			sessions, err := proxied.Count(t.Context())
			must.NoError(t, err)
			must.Eq(t, tc.inFirstShard+3, sessions, must.Sprint("without the one that is being created"))
			must.LessEq(t, tc.most+1, len(p.kinds()))
			all, err := proxied.CountAgents(t.Context(), "")
			must.NoError(t, err)
			must.Eq(t, tc.inFirstShard+4, all)
			for range 2 { // the second time the AI agents are known
				of, err := proxied.CountAgents(t.Context(), "agent-1")
				must.NoError(t, err)
				must.Eq(t, 2, of)
			}
		})
	}
}
