package storetest

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// Stores runs the contract of [scheduler.Store]. open returns a fresh cluster.
func Stores(t *testing.T, open func(t *testing.T) Cluster) {
	tests := []struct {
		name string
		test func(t *testing.T, c Cluster)
	}{
		{"a record is read as it was written, by every replica", readYourWrites},
		{"a blocking get returns once the record changes", blockingGet},
		{"a blocking get returns when its time is over", blockingGetTimesOut},
		{"a blocking list returns once a selected record changes", blockingList},
		{"a blocking list returns when its time is over", blockingListTimesOut},
		{"a blocking read ends with its caller", blockingReadIsCanceled},
		{"an index from before the store was new does not block", foreignIndex},
		{"a list by agent holds that agent's records", listByAgent},
		{"a session that changes its agent changes lists", agentChanges},
		{"bad queries are refused", badQueries},
		{"a session is expired at its expiry", expiredBoundary},
		{"the longest expired come first, up to the limit", expiredOrder},
		{"a renewed session is no longer expired", renewedIsNotExpired},
		{"an intent does not expire and is not counted", intentsAreNotSessions},
		{"records are counted by a prefix of the AI agent's ID", countsByAgent},
		{"what is in flight is creating or stopping", inFlight},
		{"a scan returns each record once", scans},
		{"a removed record leaves nothing behind", removedLeavesNothing},
		{"a damaged record is reported and hides no other", damagedIsToldOf},
		{"a record of a newer version is reported and hides no other", newerIsToldOf},
		{"a read of a caller who left fails", canceledReads},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
	t.Run("pages hold each record once", func(t *testing.T) { paging(t, open) })
}

func readYourWrites(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	full := newSession()
	full.Reason = "exit code 137 <&> out of memory"
	full.State = scheduler.StateDead
	must.Nil(t, get(t, a, full.ChatID))
	put(t, a, full)
	must.Eq(t, &full, get(t, a, full.ChatID))
	must.Eq(t, &full, get(t, b, full.ChatID))

	intent := newSession()
	intent.State, intent.ContainerID = scheduler.StateCreating, ""
	intent.Endpoint = scheduler.Session{}.Endpoint
	put(t, b, intent)
	must.Eq(t, &intent, get(t, a, intent.ChatID))

	// Times are returned in UTC and without a monotonic clock reading.
	local := newSession()
	local.CreatedAt = now.In(time.FixedZone("somewhere", 3600))
	local.ExpiresAt = time.Now().Add(time.Hour)
	put(t, a, local)
	got := get(t, b, local.ChatID)
	must.Eq(t, now, got.CreatedAt)
	must.Eq(t, local.ExpiresAt.Round(0).UTC(), got.ExpiresAt)
}

// blockedGet waits in the background until the record differs from before,
// which was read at index. A single read may return early.
func blockedGet(
	t *testing.T, store scheduler.Store, chatID uuid.UUID, before *scheduler.Session, index uint64,
) <-chan result[*scheduler.Session] {
	t.Helper()
	return background(t, func(ctx context.Context) (*scheduler.Session, error) {
		for {
			session, next, err := store.Get(ctx, chatID, scheduler.Block{Index: index, Wait: patience})
			if err != nil || !reflect.DeepEqual(session, before) {
				return session, err
			}
			index = next
		}
	})
}

func blockingGet(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	renewed := session
	renewed.ExpiresAt = now.Add(time.Hour)

	for _, next := range []*scheduler.Session{&session, &renewed, nil, &session} {
		before, index, err := b.Get(t.Context(), session.ChatID, scheduler.Block{})
		must.NoError(t, err)
		blocked := blockedGet(t, b, session.ChatID, before, index)
		write(t, a, session.ChatID, next)
		must.Eq(t, next, await(t, blocked))

		// A change from before the read does not block it.
		got, _, err := b.Get(t.Context(), session.ChatID, scheduler.Block{Index: index, Wait: patience})
		must.NoError(t, err)
		must.Eq(t, next, got)
	}
}

const shortWait = 30 * time.Millisecond

func blockingGetTimesOut(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	put(t, a, session)
	for _, chatID := range []uuid.UUID{session.ChatID, uuid.New()} {
		before, index, err := a.Get(t.Context(), chatID, scheduler.Block{})
		must.NoError(t, err)
		after, next, err := a.Get(t.Context(), chatID, scheduler.Block{Index: index, Wait: shortWait})
		must.NoError(t, err)
		must.Eq(t, before, after)
		must.Positive(t, next)
	}
}

func list(t *testing.T, store scheduler.Store, query scheduler.Query) scheduler.Page {
	t.Helper()
	page, err := store.List(t.Context(), query)
	must.NoError(t, err)
	must.Positive(t, page.Index)
	return page
}

func blockingList(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	session := newSession()
	renewed := session
	renewed.ExpiresAt = now.Add(time.Hour)
	sameExpiry := renewed
	sameExpiry.State = scheduler.StateLost

	for _, agent := range []string{"", agentID} {
		query := scheduler.Query{AgentID: agent, PerPage: 10}
		for _, next := range []*scheduler.Session{&session, &renewed, &sameExpiry, nil} {
			var want []scheduler.Session
			if next != nil {
				want = append(want, *next)
			}
			before := list(t, b, query)
			blocked := background(t, func(ctx context.Context) ([]scheduler.Session, error) {
				blocking := query
				blocking.Block = scheduler.Block{Index: before.Index, Wait: patience}
				for { // a read may return early
					page, err := b.List(ctx, blocking)
					if err != nil || !reflect.DeepEqual(page.Sessions, before.Sessions) {
						return page.Sessions, err
					}
					blocking.Block.Index = page.Index
				}
			})
			write(t, a, session.ChatID, next)
			must.Eq(t, want, await(t, blocked))
		}
	}
}

func blockingListTimesOut(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	put(t, a, session)
	for _, agent := range []string{"", agentID, "nobody"} {
		query := scheduler.Query{AgentID: agent, PerPage: 10}
		before := list(t, a, query)
		query.Block = scheduler.Block{Index: before.Index, Wait: shortWait}
		must.Eq(t, before.Sessions, list(t, a, query).Sessions)
	}
}

func blockingReadIsCanceled(t *testing.T, c Cluster) {
	a := c.Join(t)
	chatID := uuid.New()
	_, index, err := a.Get(t.Context(), chatID, scheduler.Block{})
	must.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), shortWait)
	defer cancel()
	for err == nil { // a read may return early
		_, index, err = a.Get(ctx, chatID, scheduler.Block{Index: index, Wait: patience})
	}
	must.ErrorIs(t, err, context.DeadlineExceeded)
}

func foreignIndex(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	put(t, a, session)
	block := scheduler.Block{Index: 1 << 50, Wait: shortWait}
	got, index, err := a.Get(t.Context(), session.ChatID, block)
	must.NoError(t, err)
	must.Eq(t, &session, got)
	must.Less(t, block.Index, index)

	page := list(t, a, scheduler.Query{PerPage: 1, Block: block})
	must.Eq(t, []scheduler.Session{session}, page.Sessions)
	must.Less(t, block.Index, page.Index)
}

// listAll reads all pages of a query.
func listAll(ctx context.Context, store scheduler.Store, query scheduler.Query) ([]scheduler.Session, error) {
	var all []scheduler.Session
	for {
		page, err := store.List(ctx, query)
		if err != nil {
			return nil, err
		}
		if len(page.Sessions) > query.PerPage {
			return nil, fmt.Errorf("page of %d records, want at most %d", len(page.Sessions), query.PerPage)
		}
		all = append(all, page.Sessions...)
		if page.NextToken == "" {
			return all, nil
		}
		if len(page.Sessions) == 0 {
			return nil, fmt.Errorf("empty page before the end")
		}
		query.NextToken = page.NextToken
	}
}

func listByAgent(t *testing.T, c Cluster) {
	a, b := c.Join(t), c.Join(t)
	agents := []string{"agent-1", "agent-10", "agent 1/ä?&", "x"}
	want := make(map[string][]uuid.UUID)
	for i, agent := range agents {
		for range i + 1 {
			session := newSession()
			session.AgentID = agent
			put(t, a, session)
			want[agent] = append(want[agent], session.ChatID)
		}
	}
	for _, agent := range agents {
		got, err := listAll(t.Context(), b, scheduler.Query{AgentID: agent, PerPage: 3})
		must.NoError(t, err)
		must.SliceContainsAll(t, want[agent], chats(got))
	}
	must.SliceEmpty(t, list(t, b, scheduler.Query{AgentID: "agent", PerPage: 3}).Sessions)
}

func agentChanges(t *testing.T, c Cluster) {
	a := c.Join(t)
	session := newSession()
	put(t, a, session)
	moved := session
	moved.SessionID, moved.AgentID = uuid.New(), "agent-2"
	before := list(t, a, scheduler.Query{AgentID: agentID, PerPage: 1})
	put(t, a, moved)

	gone := list(t, a, scheduler.Query{AgentID: agentID, PerPage: 1, Block: scheduler.Block{Index: before.Index, Wait: patience}})
	must.SliceEmpty(t, gone.Sessions)
	must.Eq(t, []scheduler.Session{moved}, list(t, a, scheduler.Query{AgentID: "agent-2", PerPage: 1}).Sessions)
	write(t, a, session.ChatID, nil)
	c.MustBeEmpty(t)
}

func badQueries(t *testing.T, c Cluster) {
	a := c.Join(t)
	for range 2 {
		put(t, a, newSession())
	}
	token := list(t, a, scheduler.Query{PerPage: 1}).NextToken
	must.NotEq(t, "", token)
	for _, query := range []scheduler.Query{
		{PerPage: 0},
		{PerPage: -1},
		{PerPage: scheduler.MaxPerPage + 1},
		{PerPage: 1, NextToken: "?"},
		{PerPage: 1, NextToken: token + "AAAA"},
		{PerPage: 1, NextToken: "Li4vLi4v"},
	} {
		_, err := a.List(t.Context(), query)
		must.ErrorIs(t, err, scheduler.ErrInvalid, must.Sprintf("%+v", query))
	}
}

func removedLeavesNothing(t *testing.T, c Cluster) {
	a := c.Join(t)
	for _, path := range [][]scheduler.State{
		{scheduler.StateCreating},
		{scheduler.StateCreating, scheduler.StateRunning, scheduler.StateStopping},
		{scheduler.StateRunning, scheduler.StateLost, scheduler.StateDead},
	} {
		session := newSession()
		for _, state := range path {
			session.State = state
			session.ExpiresAt = session.ExpiresAt.Add(time.Minute)
			put(t, a, session)
		}
		write(t, a, session.ChatID, nil)
		c.MustBeEmpty(t)
		must.SliceEmpty(t, list(t, a, scheduler.Query{PerPage: 10}).Sessions)
		must.SliceEmpty(t, list(t, a, scheduler.Query{AgentID: agentID, PerPage: 10}).Sessions)
	}
}

func canceledReads(t *testing.T, c Cluster) {
	a := c.Join(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, getErr := a.Get(ctx, uuid.New(), scheduler.Block{})
	_, listErr := a.List(ctx, scheduler.Query{PerPage: 1})
	_, agentErr := a.List(ctx, scheduler.Query{AgentID: agentID, PerPage: 1})
	_, expiredErr := a.Expired(ctx, now, 1)
	_, inFlightErr := a.InFlight(ctx)
	_, countErr := a.Count(ctx)
	for _, err := range []error{getErr, listErr, agentErr, expiredErr, inFlightErr, countErr} {
		must.ErrorIs(t, err, context.Canceled)
	}
}

// sorted returns the IDs in a fixed order, for comparisons.
func sorted(ids []uuid.UUID) []string {
	var all []string
	for _, id := range ids {
		all = append(all, id.String())
	}
	slices.Sort(all)
	return all
}
