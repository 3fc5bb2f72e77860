package scheduler_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestCreate_input(t *testing.T) {
	with := func(change func(*scheduler.CreateCommand)) scheduler.CreateCommand {
		cmd := createA
		change(&cmd)
		return cmd
	}
	agent := func(id string) scheduler.CreateCommand {
		return with(func(c *scheduler.CreateCommand) { c.AgentID = id })
	}
	volume := func(path string) scheduler.CreateCommand {
		return with(func(c *scheduler.CreateCommand) { c.VolumeHostPath = path })
	}
	ttl := func(d time.Duration) scheduler.CreateCommand {
		return with(func(c *scheduler.CreateCommand) { c.TTL = d })
	}
	label := func(key, value string) scheduler.CreateCommand { return labelled(map[string]string{key: value}) }
	numbered := func(n int) map[string]string {
		labels := make(map[string]string)
		for i := range n {
			labels[itoa(i)] = ""
		}
		return labels
	}
	for _, tc := range []struct {
		name  string
		cmd   scheduler.CreateCommand
		roots []string
		field string // that is refused; empty where the command is accepted
	}{
		{"no chat", with(func(c *scheduler.CreateCommand) { c.ChatID = uuid.Nil }), nil, "chat_id"},

		{"no agent", agent(""), nil, "agent_id"},
		{"the longest agent", agent(strings.Repeat("a", runtime.MaxAgentID)), nil, ""},
		{"an agent that is too long", agent(strings.Repeat("a", runtime.MaxAgentID+1)), nil, "agent_id"},
		{"an agent that is too long in bytes", agent(strings.Repeat("ä", runtime.MaxAgentID/2) + "a"), nil, "agent_id"},
		{"an agent in any script", agent("агент 代理 🤖"), nil, ""},
		{"an agent with what shells and templates read", agent(`$HOME $(id) {{.}} '"\ ;`), nil, ""},
		{"an agent with a variable of Nomad's", agent(`${env["HOME"]}`), nil, "agent_id"},
		{"an agent with a directive of a template", agent("%{ if true }"), nil, "agent_id"},
		{"an agent with a newline", agent("a\nb"), nil, "agent_id"},
		{"an agent with a NUL", agent("a\x00b"), nil, "agent_id"},
		{"an agent with a C1 control", agent("a\u0085b"), nil, "agent_id"},
		{"an agent that is not UTF-8", agent("a\xffb"), nil, "agent_id"},

		{"no volume", volume(""), nil, "volume_host_path"},
		{"the root as volume", volume("/"), nil, ""},
		{"the longest volume", volume("/" + strings.Repeat("a", runtime.MaxVolumeHostPath-1)), nil, ""},
		{"a volume that is too long", volume("/" + strings.Repeat("a", runtime.MaxVolumeHostPath)), nil, "volume_host_path"},
		{"a relative volume", volume("data/a"), nil, "volume_host_path"},
		{"a volume with ..", volume("/data/../etc"), nil, "volume_host_path"},
		{"a volume with .", volume("/data/./a"), nil, "volume_host_path"},
		{"a volume with //", volume("/data//a"), nil, "volume_host_path"},
		{"a volume with a trailing slash", volume("/data/a/"), nil, "volume_host_path"},
		{"a volume with what is reserved", volume("/data/${attr.unique.hostname}"), nil, "volume_host_path"},
		{"a volume with a directive of a template", volume("/data/%{ if true }"), nil, "volume_host_path"},
		{"a volume with a lone dollar, a colon, a comma, a space and quotes", volume(`/data/$a:b,c d'"`), nil, ""},
		{"a volume whose name begins with dots", volume("/data/..a"), nil, ""},
		{"a volume with a NUL", volume("/data/a\x00"), nil, "volume_host_path"},
		{"a volume with a newline", volume("/data/a\n"), nil, "volume_host_path"},
		{"a volume that is not UTF-8", volume("/data/\xff"), nil, "volume_host_path"},

		{"a volume directly below a root", volume("/data/a"), []string{"/srv", "/data"}, ""},
		{"a volume that is a root", volume("/data"), []string{"/srv", "/data"}, "volume_host_path"},
		{"a volume that may be inside another volume", volume("/data/a/b"), []string{"/srv", "/data"}, "volume_host_path"},
		{"a volume beside a root whose name it begins with", volume("/database"), []string{"/srv", "/data"}, "volume_host_path"},
		{"a volume above a root", volume("/"), []string{"/srv", "/data"}, "volume_host_path"},
		{"a volume directly below the root /", volume("/etc"), []string{"/"}, ""},
		{"a volume deeper below the root /", volume("/etc/a"), []string{"/"}, "volume_host_path"},
		{"the root / itself", volume("/"), []string{"/"}, "volume_host_path"},

		{"a runtime that this Bivouac has", with(func(c *scheduler.CreateCommand) { c.Runtime = "fake" }), nil, ""},
		{"a runtime that nobody has", with(func(c *scheduler.CreateCommand) { c.Runtime = "other" }), nil, "runtime"},

		{"as many labels as there may be", labelled(numbered(scheduler.MaxLabels)), nil, ""},
		{"a label too many", labelled(numbered(scheduler.MaxLabels + 1)), nil, "labels"},
		{"the longest label", label(strings.Repeat("a", scheduler.MaxLabelKey), strings.Repeat("b", scheduler.MaxLabelValue)), nil, ""},
		{"a label with a path as key", label("example.com/team_1-a", ""), nil, ""},
		{"a label with a key that is too long", label(strings.Repeat("a", scheduler.MaxLabelKey+1), ""), nil, "labels"},
		{"a label without a key", label("", "a"), nil, "labels"},
		{"a label with a key of another script", label("ä", ""), nil, "labels"},
		{"a label with a key that begins with a dot", label(".a", ""), nil, "labels"},
		{"a label with a key that ends with a newline", label("a\n", ""), nil, "labels"},
		{"a label with any value", label("a", "агент ${x} %{y} {{.}} '\"\\"), nil, ""},
		{"a label with a value that is too long", label("a", strings.Repeat("ä", scheduler.MaxLabelValue/2)+"b"), nil, "labels"},
		{"a label with a value that is not UTF-8", label("a", "\xff"), nil, "labels"},
		{"a label with a value with a tab", label("a", "\t"), nil, "labels"},

		{"a negative ttl", ttl(-1), nil, "ttl"},
		{"the shortest ttl", ttl(scheduler.MinTTL), nil, ""},
		{"a ttl that is too short", ttl(scheduler.MinTTL - 1), nil, "ttl"},
		{"the longest ttl", ttl(maxTTL), nil, ""},
		{"a ttl that is too long", ttl(maxTTL + 1), nil, "ttl"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, func(c *scheduler.Config) { c.VolumeRoots = tc.roots })
			_, err := w.Create(t.Context(), tc.cmd)
			if tc.field == "" {
				must.NoError(t, err)
				return
			}
			must.ErrorIs(t, err, scheduler.ErrInvalid)
			must.StrContains(t, err.Error(), tc.field+" ")
			must.SliceEmpty(t, w.effects.taken(), must.Sprint("nothing was done"))
		})
	}
}

func TestTheNilUUIDIsNoChat(t *testing.T) {
	w := newWorld(t)
	_, err := w.Delete(t.Context(), uuid.Nil)
	must.ErrorIs(t, err, scheduler.ErrInvalid)
	_, err = w.Renew(t.Context(), uuid.Nil, 0)
	must.ErrorIs(t, err, scheduler.ErrInvalid)
	must.SliceEmpty(t, w.effects.taken(), must.Sprint("its lock is the leader's"))
}

func TestNew_refusesAConfigurationThatCannotWork(t *testing.T) {
	for name, change := range map[string]func(*scheduler.Config){
		"a default runtime that is not there": func(c *scheduler.Config) { c.DefaultRuntime = "other" },
		"no runtime":                          func(c *scheduler.Config) { c.Drivers = nil },
		"no ttl":                              func(c *scheduler.Config) { c.TTL = 0 },
		"a ttl that is too short":             func(c *scheduler.Config) { c.TTL = scheduler.MinTTL - 1 },
		"a ttl over the maximum":              func(c *scheduler.Config) { c.TTL = maxTTL + 1 },
		"a cleanup interval that is none":     func(c *scheduler.Config) { c.CleanupInterval = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			c := newWorld(t).config()
			change(&c)
			_, err := scheduler.New(c)
			must.ErrorIs(t, err, scheduler.ErrInvalid)
		})
	}
}

func TestKind_isTheFirstThatAnErrorWraps(t *testing.T) {
	for kind, err := range map[string]error{
		"invalid":             scheduler.ErrInvalid,
		"not_found":           scheduler.ErrNotFound,
		"expired":             scheduler.ErrExpired,
		"not_running":         scheduler.ErrNotRunning,
		"conflict":            &scheduler.ConflictError{},
		"lock_timeout":        scheduler.ErrLockTimeout,
		"lock_lost":           fmt.Errorf("%w: %w", scheduler.ErrLockLost, context.Canceled),
		"damaged_record":      scheduler.ErrDamaged,
		"busy":                scheduler.ErrBusy,
		"store_unavailable":   fmt.Errorf("%w: %w", scheduler.ErrUnavailable, context.DeadlineExceeded),
		"not_placed":          runtime.ErrNotPlaced,
		"not_stopped":         runtime.ErrNotStopped,
		"not_ready":           fmt.Errorf("%w: %w", runtime.ErrNotReady, context.DeadlineExceeded),
		"sandbox_not_found":   runtime.ErrNotFound,
		"sandbox_conflict":    runtime.ErrConflict,
		"runtime_invalid":     runtime.ErrInvalid,
		"runtime_unavailable": runtime.ErrUnavailable,
		"deadline_exceeded":   context.DeadlineExceeded,
		"canceled":            context.Canceled,
		"internal":            fmt.Errorf("something else"),
	} {
		must.Eq(t, kind, scheduler.Kind(fmt.Errorf("some operation: %w", err)))
	}
}
