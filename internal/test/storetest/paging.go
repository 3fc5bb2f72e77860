package storetest

import (
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"pgregory.net/rapid"

	"github.com/bivouac/bivouac/scheduler"
)

// paging shows that, for any records and any page size, the pages of a list
// contain each selected record once, in an order that does not depend on the
// page size.
func paging(t *testing.T, open func(t *testing.T) Cluster) {
	rapid.Check(t, func(rt *rapid.T) {
		replica := open(t).Join(t)
		chosen := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b"}), 0, 40).Draw(rt, "agents")
		perPage := rapid.IntRange(1, 20).Draw(rt, "per page")

		want := make(map[string][]uuid.UUID)
		for _, agent := range chosen {
			session := newSession()
			session.AgentID = agent
			put(t, replica, session)
			want[agent] = append(want[agent], session.ChatID)
			want[""] = append(want[""], session.ChatID)
		}
		for _, agent := range []string{"", "a", "b"} {
			small, err := listAll(t.Context(), replica, scheduler.Query{AgentID: agent, PerPage: perPage})
			must.NoError(rt, err)
			must.Eq(rt, sorted(want[agent]), sorted(chats(small)))

			whole, err := listAll(t.Context(), replica, scheduler.Query{AgentID: agent, PerPage: scheduler.MaxPerPage})
			must.NoError(rt, err)
			must.Eq(rt, chats(whole), chats(small))

			isEven := func(session scheduler.Session) bool { return session.ChatID[15]%2 == 0 }
			even, err := listAll(t.Context(), replica, scheduler.Query{AgentID: agent, PerPage: perPage, Include: isEven})
			must.NoError(rt, err)
			var wantEven []scheduler.Session
			for _, session := range whole {
				if isEven(session) {
					wantEven = append(wantEven, session)
				}
			}
			must.Eq(rt, chats(wantEven), chats(even))
		}
	})
}
