package scheduler_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestGet_tellsWhatTheRuntimeSees(t *testing.T) {
	for _, tc := range []struct {
		name  string
		given []func(*world)
		want  string
	}{
		{"it runs", nil, "chat-a s1 running container-1 12:30:00"},
		{"it has expired and is not cleaned up yet", []func(*world){later(defaultTTL)}, "chat-a s1 running container-1 12:30:00"},
		{"it is dead", []func(*world){killed("exit code 137: OOM killed")}, "chat-a s1 dead container-1 12:30:00: exit code 137: OOM killed"},
		{"it is lost", []func(*world){lost("node down")}, "chat-a s1 lost container-1 12:30:00: node down"},
		{"it is gone", []func(*world){forgotten}, "chat-a s1 lost container-1 12:30:00: the runtime no longer knows the sandbox"},
		{"another stands in its place", []func(*world){swapped},
			"chat-a s1 lost container-1 12:30:00: another sandbox has taken its place: foreign-1"},
		{"the runtime has not seen it start yet", []func(*world){lagging}, "chat-a s1 running container-1 12:30:00"},
		{"the runtime cannot tell", []func(*world){fails("driver.inspect", runtime.ErrUnavailable)}, "chat-a s1 running container-1 12:30:00"},
		{"it is being stopped", []func(*world){abandonedStop}, "chat-a s1 stopping container-1 12:30:00"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(createA))
			w.given(tc.given...)

			session, index, err := w.Get(t.Context(), chatA, scheduler.Block{})

			must.NoError(t, err)
			must.Eq(t, tc.want, w.describe(session))
			must.Positive(t, index)
			must.SliceNotContains(t, w.effects.taken(), "lock", must.Sprint("a read takes no lock"))
		})
	}
}

func TestGet_aChatWithoutASession(t *testing.T) {
	w := newWorld(t)
	_, index, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrNotFound)
	must.Positive(t, index, must.Sprint("one can wait for it"))

	w.effects.fail("get", scheduler.ErrUnavailable)
	_, _, err = w.Get(t.Context(), chatA, scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
}

func TestGet_waitsForAChange(t *testing.T) {
	w := newWorld(t)
	_, index, err := w.Get(t.Context(), chatA, scheduler.Block{})
	must.ErrorIs(t, err, scheduler.ErrNotFound)

	type answer struct {
		session scheduler.Session
		err     error
	}
	answers := make(chan answer)
	go func() {
		s, _, err := w.Get(context.Background(), chatA, scheduler.Block{Index: index})
		answers <- answer{s, err}
	}()
	_, err = w.Create(t.Context(), createA)
	must.NoError(t, err)

	got := <-answers
	must.NoError(t, got.err)
	must.Eq(t, chatA, got.session.ChatID)
}

func TestList(t *testing.T) {
	w := newWorld(t)
	other := createB
	other.AgentID = "agent-2"
	w.given(created(createA), created(other), created(createC))

	for _, tc := range []struct {
		agent   string
		perPage int
		want    []string
	}{
		{"", 10, []string{"chat-a", "chat-b", "chat-c"}},
		{"", 1, []string{"chat-a", "chat-b", "chat-c"}},
		{"", 2, []string{"chat-a", "chat-b", "chat-c"}},
		{"agent-1", 1, []string{"chat-a", "chat-c"}},
		{"agent-2", scheduler.MaxPerPage, []string{"chat-b"}},
		{"agent-3", 1, nil},
	} {
		t.Run(fmt.Sprintf("agent %q by %d", tc.agent, tc.perPage), func(t *testing.T) {
			var chats []string
			query := scheduler.Query{AgentID: tc.agent, PerPage: tc.perPage}
			for {
				page, err := w.List(t.Context(), query)
				must.NoError(t, err)
				must.LessEq(t, tc.perPage, len(page.Sessions))
				for _, s := range page.Sessions {
					chats = append(chats, chatNames[s.ChatID])
				}
				if page.NextToken == "" {
					break
				}
				query.NextToken = page.NextToken
			}
			must.Eq(t, tc.want, chats)
		})
	}
}

func TestList_refusals(t *testing.T) {
	w := newWorld(t)
	for _, query := range []scheduler.Query{
		{PerPage: 0}, {PerPage: -1}, {PerPage: scheduler.MaxPerPage + 1}, {PerPage: 1, NextToken: "made up"},
	} {
		_, err := w.List(t.Context(), query)
		must.ErrorIs(t, err, scheduler.ErrInvalid)
	}
	w.effects.fail("list", scheduler.ErrUnavailable)
	_, err := w.List(t.Context(), scheduler.Query{PerPage: 1})
	must.ErrorIs(t, err, scheduler.ErrUnavailable)
}

func TestList_includesWhatTheQuerySelects(t *testing.T) {
	w := newWorld(t)
	other := createB
	other.AgentID = "agent-2"
	w.given(created(createA), created(other), created(createC))
	var asked []string
	query := scheduler.Query{PerPage: 10, Include: func(s scheduler.Session) bool {
		asked = append(asked, chatNames[s.ChatID])
		return s.ChatID != chatA
	}}
	listed := func(ctx context.Context) (names []string) {
		asked = nil
		page, err := w.List(ctx, query)
		must.NoError(t, err)
		must.Positive(t, page.Index)
		for _, s := range page.Sessions {
			names = append(names, chatNames[s.ChatID])
		}
		return names
	}

	must.Eq(t, []string{"chat-b", "chat-c"}, listed(t.Context()))
	must.Eq(t, []string{"chat-c"}, listed(as(t, rule("agent-1", scheduler.CapRead))))
	must.SliceNotContains(t, asked, "chat-b", must.Sprint("nothing of what the caller may not see gets out"))
}
