package scheduler_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// as returns a context with a caller that has these rules, in one policy.
func as(t *testing.T, rules ...scheduler.AgentRule) context.Context {
	return scheduler.WithCaller(t.Context(), scheduler.Caller{
		Name: "caller", Policies: []*scheduler.Policy{{Name: "policy", Agents: rules}},
	})
}

func rule(prefix string, capabilities scheduler.Capabilities) scheduler.AgentRule {
	return scheduler.AgentRule{Prefix: prefix, Capabilities: capabilities}
}

func TestMay(t *testing.T) {
	policies := func(rules ...[]scheduler.AgentRule) []*scheduler.Policy {
		all := []*scheduler.Policy{}
		for _, r := range rules {
			all = append(all, &scheduler.Policy{Agents: r})
		}
		return all
	}
	r, w, x := scheduler.CapRead, scheduler.CapWrite, scheduler.CapExec
	for _, tc := range []struct {
		name       string
		policies   []*scheduler.Policy
		capability scheduler.Capabilities
		agent      string
		want       bool
	}{
		{"without authentication everything", nil, x, "a", true},
		{"without a policy nothing", policies(), r, "a", false},
		{"what the prefix allows", policies([]scheduler.AgentRule{rule("support-", r)}), r, "support-1", true},
		{"not what it does not allow", policies([]scheduler.AgentRule{rule("support-", r)}), w, "support-1", false},
		{"write includes read", policies([]scheduler.AgentRule{rule("support-", w)}), r, "support-1", true},
		{"write does not include exec", policies([]scheduler.AgentRule{rule("support-", w)}), x, "support-1", false},
		{"nothing with another prefix", policies([]scheduler.AgentRule{rule("support-", r)}), r, "sales-1", false},
		{"the prefix itself", policies([]scheduler.AgentRule{rule("support-", r)}), r, "support-", true},
		{"nothing for less than the prefix", policies([]scheduler.AgentRule{rule("support-", r)}), r, "support", false},
		{"the longest prefix wins", policies([]scheduler.AgentRule{rule("", w), rule("secret-", 0)}), r, "secret-1", false},
		{"the longest prefix wins in any order", policies([]scheduler.AgentRule{rule("secret-", 0), rule("", w)}), r, "secret-1", false},
		{"one policy is enough", policies([]scheduler.AgentRule{rule("secret-", 0)}, []scheduler.AgentRule{rule("", r)}), r, "secret-1", true},
		{"letters count", policies([]scheduler.AgentRule{rule("support-", r)}), r, "Support-1", false},
		{"agents that only look alike", policies([]scheduler.AgentRule{rule("support-", r)}), r, "suppоrt-1", false}, // with a Cyrillic letter
		{"other forms of the same letter", policies([]scheduler.AgentRule{rule("caf\u00e9-", r)}), r, "cafe\u0301-1", false},
		{"a prefix that ends within a letter matches no other letter", policies([]scheduler.AgentRule{rule("caf\u00e9", r)}), r, "caf\u00e8", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			must.Eq(t, tc.want, scheduler.Caller{Policies: tc.policies}.May(tc.capability, tc.agent))
		})
	}
}

// TestSessionsOfOthers has a session of agent-1, and a caller who may write for agent-2
// alone. To that caller the chat has no session.
func TestSessionsOfOthers(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	other := as(t, rule("agent-2", scheduler.CapWrite))

	t.Run("are not found by a read", func(t *testing.T) {
		_, index, err := w.Get(other, chatA, scheduler.Block{})
		must.ErrorIs(t, err, scheduler.ErrNotFound)
		_, absent, err := w.Get(other, chatB, scheduler.Block{})
		must.ErrorIs(t, err, scheduler.ErrNotFound)
		must.Eq(t, absent, index)
	})
	t.Run("are not in a list", func(t *testing.T) {
		page, err := w.List(other, scheduler.Query{PerPage: 10})
		must.NoError(t, err)
		must.SliceEmpty(t, page.Sessions)
		must.Eq(t, "", page.NextToken)
	})
	t.Run("cannot be asked for by the agent", func(t *testing.T) {
		_, err := w.List(other, scheduler.Query{PerPage: 10, AgentID: "agent-1"})
		must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	})
	t.Run("cannot be renewed", func(t *testing.T) {
		_, err := w.Renew(other, chatA, 0)
		must.ErrorIs(t, err, scheduler.ErrNotFound)
	})
	t.Run("are not deleted", func(t *testing.T) {
		res, err := w.Delete(other, chatA)
		must.NoError(t, err)
		must.Eq(t, scheduler.DeleteResult{ChatID: chatA}, res)
		must.Eq(t, []string{"chat-a s1"}, w.running())
	})
	t.Run("are not shown by a create", func(t *testing.T) {
		cmd := createA
		cmd.AgentID = "agent-2"
		_, err := w.Create(other, cmd)
		must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
		must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
		must.StrNotContains(t, err.Error(), "agent-1")
	})
	t.Run("do not make the caller wait for their lock", func(t *testing.T) {
		lease, err := w.peer().locker.Lock(t.Context(), chatA, 0)
		must.NoError(t, err)
		defer func() { must.NoError(t, lease.Release(t.Context())) }()
		_, err = w.Renew(other, chatA, 0)
		must.ErrorIs(t, err, scheduler.ErrNotFound)
		_, err = w.Delete(other, chatA)
		must.NoError(t, err)
		cmd := createA
		cmd.AgentID = "agent-2"
		_, err = w.Create(other, cmd)
		must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	})
	t.Run("are not replaced once they have expired", func(t *testing.T) {
		w.clock.advance(defaultTTL)
		cmd := createA
		cmd.AgentID = "agent-2"
		_, err := w.Create(other, cmd)
		must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
		must.Eq(t, []string{"chat-a s1"}, w.running())
	})
}

func TestReaderMayNotChange(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	reader := as(t, rule("", scheduler.CapRead))

	_, _, err := w.Get(reader, chatA, scheduler.Block{})
	must.NoError(t, err)
	_, err = w.Create(reader, createA)
	must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	_, err = w.Renew(reader, chatA, 0)
	must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	_, err = w.Delete(reader, chatA)
	must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	_, err = w.CleanupExpired(reader)
	must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	_, err = w.Repair(reader, chatA)
	must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	_, err = w.Adopt(reader)
	must.ErrorIs(t, err, scheduler.ErrPermissionDenied)
	must.Eq(t, []string{"chat-a s1"}, w.running())
}

// TestWatchOfOthers waits for a chat while sessions of others come and go.
func TestWatchOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		mine := as(t, rule("agent-2", scheduler.CapWrite))
		_, index, err := w.Get(mine, chatA, scheduler.Block{})
		must.ErrorIs(t, err, scheduler.ErrNotFound)
		page, err := w.List(mine, scheduler.Query{PerPage: 10})
		must.NoError(t, err)

		got, listed := make(chan error, 1), make(chan int, 1)
		began := time.Now()
		go func() {
			_, _, err := w.Get(mine, chatA, scheduler.Block{Index: index, Wait: time.Minute})
			got <- err
		}()
		go func() {
			page, err := w.List(mine, scheduler.Query{PerPage: 10, Block: scheduler.Block{Index: page.Index, Wait: time.Minute}})
			must.NoError(t, err)
			listed <- len(page.Sessions)
		}()
		synctest.Wait()
		_, err = w.Create(t.Context(), createA)
		must.NoError(t, err)
		synctest.Wait()
		must.Eq(t, 0, len(got)+len(listed), must.Sprint("another caller's create is not noticed"))
		_, err = w.Delete(t.Context(), chatA)
		must.NoError(t, err)
		synctest.Wait()
		must.Eq(t, 0, len(got)+len(listed))

		cmd := createA
		cmd.AgentID = "agent-2"
		_, err = w.Create(mine, cmd)
		must.NoError(t, err)
		must.NoError(t, <-got)
		must.Eq(t, 1, <-listed)
		must.Less(t, time.Second, time.Since(began))
	})
}

// TestWatchOfOthers_reads_seldom waits while others change something all the time.
func TestWatchOfOthers_reads_seldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		mine := as(t, rule("agent-2", scheduler.CapRead))
		page, err := w.List(mine, scheduler.Query{PerPage: 10})
		must.NoError(t, err)

		done := make(chan time.Duration, 1)
		began := time.Now()
		go func() {
			_, err := w.List(mine, scheduler.Query{PerPage: 10, Block: scheduler.Block{Index: page.Index, Wait: 10 * time.Second}})
			must.NoError(t, err)
			done <- time.Since(began)
		}()
		for time.Since(began) < 10*time.Second {
			_, err = w.Create(t.Context(), createA)
			must.NoError(t, err)
			_, err = w.Delete(t.Context(), chatA)
			must.NoError(t, err)
			time.Sleep(10 * time.Millisecond)
		}
		must.Between(t, 10*time.Second, <-done, 10*time.Second+10*time.Millisecond)
		lists := slices.DeleteFunc(w.effects.taken(), func(name string) bool { return name != "list" })
		must.Between(t, 10, len(lists), 40)
	})
}

// TestListPagesAreFull lists among many sessions of others.
func TestListPagesAreFull(t *testing.T) {
	w := newWorld(t)
	for i := range 30 {
		cmd := scheduler.CreateCommand{ChatID: uuid.New(), AgentID: "agent-1", VolumeHostPath: "/data/a"}
		if i%5 == 0 {
			cmd.AgentID = "agent-2"
		}
		_, err := w.Create(t.Context(), cmd)
		must.NoError(t, err)
	}
	mine := as(t, rule("agent-2", scheduler.CapRead))
	var pages []int
	for token := ""; ; {
		page, err := w.List(mine, scheduler.Query{PerPage: 4, NextToken: token})
		must.NoError(t, err)
		for _, session := range page.Sessions {
			must.Eq(t, "agent-2", session.AgentID)
		}
		pages = append(pages, len(page.Sessions))
		if token = page.NextToken; token == "" {
			break
		}
	}
	must.Eq(t, []int{4, 2}, pages)
}

func TestCreate_withinAPolicy(t *testing.T) {
	limited := scheduler.AgentRule{
		Prefix: "agent-", Capabilities: scheduler.CapWrite, VolumeRoots: []string{"/data"}, MaxTTL: 10 * time.Minute, MaxSessions: 1,
	}
	for _, tc := range []struct {
		name  string
		cmd   scheduler.CreateCommand
		rules []scheduler.AgentRule
		want  error
		ttl   time.Duration
	}{
		{"the default TTL is shortened", createA, []scheduler.AgentRule{limited}, nil, 10 * time.Minute},
		{"a TTL that is longer is refused", scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/data/a", TTL: 11 * time.Minute},
			[]scheduler.AgentRule{limited}, scheduler.ErrInvalid, 0},
		{"a volume elsewhere is refused", scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/other/a"},
			[]scheduler.AgentRule{limited}, scheduler.ErrPermissionDenied, 0},
		{"a volume inside another is refused", scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/data/a/b"},
			[]scheduler.AgentRule{limited}, scheduler.ErrPermissionDenied, 0},
		{"the root of the file system is no volume", scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/"},
			[]scheduler.AgentRule{{Capabilities: scheduler.CapWrite, VolumeRoots: []string{"/"}}}, scheduler.ErrPermissionDenied, 0},
		{"another agent is refused", scheduler.CreateCommand{ChatID: chatA, AgentID: "other", VolumeHostPath: "/data/a"},
			[]scheduler.AgentRule{limited}, scheduler.ErrPermissionDenied, 0},
		{"without limits all is as without a policy", createA, []scheduler.AgentRule{rule("", scheduler.CapWrite)}, nil, defaultTTL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			res, err := w.Create(as(t, tc.rules...), tc.cmd)
			if tc.want != nil {
				must.ErrorIs(t, err, tc.want)
				must.Eq(t, 0, w.driver.Created())
				return
			}
			must.NoError(t, err)
			must.Eq(t, noon.Add(tc.ttl), res.Session.ExpiresAt)
			must.Eq(t, "caller", res.Session.Owner)
		})
	}

	t.Run("sessions over the quota are refused, and a reuse is not", func(t *testing.T) {
		w := newWorld(t)
		ctx := as(t, limited)
		_, err := w.Create(ctx, createA)
		must.NoError(t, err)
		second := createA
		second.ChatID = chatB
		_, err = w.Create(ctx, second)
		must.ErrorIs(t, err, scheduler.ErrQuota)
		must.Eq(t, 1, w.driver.Created())
		_, err = w.Create(ctx, createA)
		must.NoError(t, err)
	})
	t.Run("sessions over the quota of the server are refused", func(t *testing.T) {
		w := newWorld(t, func(c *scheduler.Config) { c.MaxSessions = 1 })
		_, err := w.Create(t.Context(), createA)
		must.NoError(t, err)
		second := createA
		second.ChatID = chatB
		_, err = w.Create(t.Context(), second)
		must.ErrorIs(t, err, scheduler.ErrQuota)
	})
	t.Run("a session that ended is replaced within the quota", func(t *testing.T) {
		w := newWorld(t, func(c *scheduler.Config) { c.MaxSessions = 1 })
		_, err := w.Create(as(t, limited), createA)
		must.NoError(t, err)
		w.clock.advance(maxTTL)
		res, err := w.Create(as(t, limited), createA)
		must.NoError(t, err)
		must.Eq(t, scheduler.ResultReplaced, res.Result)
	})
}
