package scheduler_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

var catCommand = runtime.Command{Args: []string{"cat"}}

// caller returns the context of a caller with capabilities for all AI agents.
func caller(name string, capabilities scheduler.Capabilities) context.Context {
	return scheduler.WithCaller(context.Background(), scheduler.Caller{
		Name: name, Policies: []*scheduler.Policy{{Agents: []scheduler.AgentRule{{Capabilities: capabilities}}}},
	})
}

func TestExec(t *testing.T) {
	t.Run("runs_a_command_and_extends_nothing", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA), later(10*time.Minute))
		exec, err := w.Exec(t.Context(), chatA, catCommand, 0)
		must.NoError(t, err)
		defer exec.Release()
		var out bytes.Buffer
		code, err := exec.Run(t.Context(), runtime.Streams{Stdin: strings.NewReader("hello"), Stdout: &out})
		must.NoError(t, err)
		must.Eq(t, 0, code)
		must.Eq(t, "hello", out.String())
		must.Eq(t, []string{"chat-a s1 running container-1 12:30:00"}, w.records())
	})

	t.Run("renews_if_asked_to", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		exec, err := w.Exec(t.Context(), chatA, catCommand, time.Hour)
		must.NoError(t, err)
		exec.Release()
		must.Eq(t, []string{"chat-a s1 running container-1 13:00:00"}, w.records())
	})

	for _, tc := range []struct {
		name   string
		given  []func(*world)
		caller context.Context
		chat   uuid.UUID
		renew  time.Duration
		want   error
	}{
		{"refuses_a_chat_without_a_session", nil, t.Context(), chatB, 0, scheduler.ErrNotFound},
		{"refuses_a_caller_without_the_capability", nil, caller("ann", scheduler.CapWrite), chatA, 0, scheduler.ErrPermissionDenied},
		{"hides_a_session_from_a_caller_who_may_not_see_it", nil, caller("ann", scheduler.CapExec), chatA, 0, scheduler.ErrNotFound},
		{"needs_write_to_renew", nil, caller("ann", scheduler.CapRead|scheduler.CapExec), chatA, time.Hour, scheduler.ErrPermissionDenied},
		{"refuses_a_session_that_has_expired", []func(*world){later(defaultTTL)}, t.Context(), chatA, 0, scheduler.ErrExpired},
		{"refuses_a_sandbox_that_has_ended", []func(*world){func(w *world) {
			must.NoError(t, w.driver.Stop(t.Context(), w.standing(chatA).SessionID.String()))
		}}, t.Context(), chatA, 0, scheduler.ErrNotRunning},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(append([]func(*world){created(createA)}, tc.given...)...)
			_, err := w.Exec(tc.caller, tc.chat, catCommand, tc.renew)
			must.ErrorIs(t, err, tc.want)
		})
	}

	t.Run("refuses_a_runtime_without_the_ability", func(t *testing.T) {
		w := newWorld(t, func(c *scheduler.Config) {
			c.Drivers = map[string]runtime.Driver{"fake": struct{ runtime.Driver }{c.Drivers["fake"]}}
		})
		w.given(created(createA))
		_, err := w.Exec(t.Context(), chatA, catCommand, 0)
		must.ErrorIs(t, err, errors.ErrUnsupported)
	})

	t.Run("tells_that_the_session_was_deleted_meanwhile", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		began := make(chan struct{})
		w.driver.SetExec(func(ctx context.Context, _ runtime.Command, _ runtime.Streams) (int, error) {
			close(began)
			<-ctx.Done()
			return 0, ctx.Err()
		})
		exec, err := w.Exec(t.Context(), chatA, catCommand, 0)
		must.NoError(t, err)
		defer exec.Release()
		ended := make(chan error, 1)
		go func() {
			_, err := exec.Run(t.Context(), runtime.Streams{})
			ended <- err
		}()
		<-began
		_, err = w.Delete(t.Context(), chatA)
		must.NoError(t, err)
		must.ErrorIs(t, <-ended, scheduler.ErrNotRunning)
	})

	t.Run("ends_when_the_replica_does", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		w.driver.SetExec(func(ctx context.Context, _ runtime.Command, _ runtime.Streams) (int, error) {
			w.End(t.Context())
			<-ctx.Done()
			return 0, ctx.Err()
		})
		exec, err := w.Exec(t.Context(), chatA, catCommand, 0)
		must.NoError(t, err)
		defer exec.Release()
		_, err = exec.Run(t.Context(), runtime.Streams{})
		must.ErrorIs(t, err, scheduler.ErrShuttingDown)
	})

	t.Run("names_the_limit_of_the_runtime", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		w.driver.SetExec(func(context.Context, runtime.Command, runtime.Streams) (int, error) { return 0, runtime.ErrBusy })
		exec, err := w.Exec(t.Context(), chatA, catCommand, 0)
		must.NoError(t, err)
		defer exec.Release()
		_, err = exec.Run(t.Context(), runtime.Streams{})
		must.Eq(t, "runtime_execs", limitOf(err))
	})
}

func limitOf(err error) string {
	limit, ok := errors.AsType[*scheduler.LimitError](err)
	if !ok {
		return fmt.Sprint(err)
	}
	return limit.Limit
}

// TestExecLimits fills the places of commands.
func TestExecLimits(t *testing.T) {
	w := newWorld(t)
	chats := make([]uuid.UUID, 12)
	for i := range chats {
		chats[i] = uuid.New()
		w.given(created(scheduler.CreateCommand{ChatID: chats[i], AgentID: "agent-1", VolumeHostPath: fmt.Sprint("/data/", i)}))
	}
	all := scheduler.CapRead | scheduler.CapExec
	var releases []func()
	fill := func(caller context.Context, chat uuid.UUID, many int) {
		for range many {
			exec, err := w.Exec(caller, chat, catCommand, 0)
			must.NoError(t, err)
			releases = append(releases, exec.Release)
		}
	}
	refused := func(caller context.Context, chat uuid.UUID) string {
		_, err := w.Exec(caller, chat, catCommand, 0)
		must.ErrorIs(t, err, scheduler.ErrBusy)
		return limitOf(err)
	}
	fill(caller("a", all), chats[0], 8)
	must.Eq(t, "execs_per_session", refused(caller("b", all), chats[0]))
	fill(caller("a", all), chats[1], 8)
	must.Eq(t, "execs_per_caller", refused(caller("a", all), chats[2]))
	namesake := scheduler.CallerFrom(caller("a", all))
	namesake.Method = "jwt/other"
	exec, err := w.Exec(scheduler.WithCaller(t.Context(), namesake), chats[2], catCommand, 0)
	must.NoError(t, err)
	exec.Release()
	for i, name := range []string{"b", "c", "d"} {
		fill(caller(name, all), chats[2+2*i], 8)
		fill(caller(name, all), chats[3+2*i], 8)
	}
	must.Eq(t, "execs", refused(caller("e", all), chats[8]))
	for _, release := range releases {
		release()
	}
	fill(caller("a", all), chats[0], 1) // refusals took no places
}
