package scheduler_test

import (
	"context"
	"errors"
	"maps"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// createCase says what a create does, given what stands when it is asked for.
type createCase struct {
	name  string
	given []func(*world)
	cmd   scheduler.CreateCommand // createA where it is zero
	want  outcome
}

func (tc createCase) run(t *testing.T) {
	w := newWorld(t)
	w.given(tc.given...)
	cmd := tc.cmd
	if cmd.AgentID == "" {
		cmd = createA
	}
	res, err := w.Create(t.Context(), cmd)
	got := w.outcome(string(res.Result), err)
	must.Eq(t, tc.want, got)
	if err == nil {
		must.Eq(t, w.standing(cmd.ChatID), res.Session, must.Sprint("the caller is told what is on record"))
	}
}

// createSpan is the span of a create of createA, with more attributes.
func createSpan(failed string, more attrs) []span {
	all := attrs{"chat.id": "chat-a", "agent.id": "agent-1", "volume.host_path": "/data/a"}
	maps.Copy(all, more)
	if failed != "" {
		all["sandbox.result"] = "error"
		all["error.type"] = failed
	}
	return []span{{Name: "usecase.create_sandbox", Attrs: all, Error: failed}}
}

func TestCreate_aChatWithoutASessionGetsOne(t *testing.T) {
	for _, tc := range []createCase{{
		name: "nothing stands",
		want: outcome{
			Result:  "created",
			Effects: []string{"get", "lock", "driver.find", "write creating", "driver.create", "write running + release"},
			Spans: createSpan("", attrs{
				"sandbox.result":                   "created",
				"session.id":                       "s1",
				"container.id":                     "container-1",
				"sandbox.session_agent.id":         "agent-1",
				"sandbox.session_volume.host_path": "/data/a",
				"sandbox.endpoint.ip":              "127.0.0.1",
				"sandbox.endpoint.port":            "20001",
			}),
			Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=created} 1"},
			Logs:    []string{"info sandbox_created chat_id=chat-a session_id=s1 container_id=container-1"},
			Records: []string{"chat-a s1 running container-1 12:30:00"},
			Running: []string{"chat-a s1"},
		},
	}, {
		name: "with a time to live of its own",
		cmd:  scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-1", VolumeHostPath: "/data/a", TTL: maxTTL},
		want: outcome{
			Result:  "created",
			Effects: []string{"get", "lock", "driver.find", "write creating", "driver.create", "write running + release"},
			Spans: createSpan("", attrs{
				"sandbox.result":                   "created",
				"session.id":                       "s1",
				"container.id":                     "container-1",
				"sandbox.session_agent.id":         "agent-1",
				"sandbox.session_volume.host_path": "/data/a",
				"sandbox.endpoint.ip":              "127.0.0.1",
				"sandbox.endpoint.port":            "20001",
			}),
			Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=created} 1"},
			Logs:    []string{"info sandbox_created chat_id=chat-a session_id=s1 container_id=container-1"},
			Records: []string{"chat-a s1 running container-1 14:00:00"},
			Running: []string{"chat-a s1"},
		},
	}, {
		name:  "somebody began a start and is gone: it is undone first",
		given: []func(*world){abandonedStart},
		want: outcome{
			Result: "created",
			Effects: []string{"get", "lock", "driver.find", "driver.inspect", "driver.delete", "write creating", "driver.create",
				"write running + release"},
			Spans: createSpan("", attrs{
				"sandbox.result":                   "created",
				"session.id":                       "s2",
				"container.id":                     "container-2",
				"sandbox.session_agent.id":         "agent-1",
				"sandbox.session_volume.host_path": "/data/a",
				"sandbox.endpoint.ip":              "127.0.0.1",
				"sandbox.endpoint.port":            "20002",
			}),
			Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=created} 1"},
			Logs:    []string{"info sandbox_created chat_id=chat-a session_id=s2 container_id=container-2"},
			Records: []string{"chat-a s2 running container-2 12:30:00"},
			Running: []string{"chat-a s2"},
		},
	}, {
		name:  "somebody began a start and is gone, and it cannot be undone",
		given: []func(*world){abandonedStart, fails("driver.delete", runtime.ErrUnavailable)},
		want: outcome{
			Result:  "error runtime_unavailable",
			Effects: []string{"get", "lock", "driver.find", "driver.inspect", "driver.delete", "release"},
			Spans:   createSpan("runtime_unavailable", nil),
			Metrics: []string{"sandbox.active.count 0", "sandbox.create.total{result=error} 1"},
			Logs:    []string{"error sandbox_create_failed chat_id=chat-a error=runtime_unavailable"},
			Records: []string{"chat-a s1 creating  12:30:00"},
			Running: []string{"chat-a s1"},
		},
	}} {
		t.Run(tc.name, tc.run)
	}
}

// sessionAttrs are those of createA's session, the first one.
func sessionAttrs(more attrs) attrs {
	all := attrs{
		"session.id":                       "s1",
		"container.id":                     "container-1",
		"sandbox.session_agent.id":         "agent-1",
		"sandbox.session_volume.host_path": "/data/a",
		"sandbox.endpoint.ip":              "127.0.0.1",
		"sandbox.endpoint.port":            "20001",
	}
	maps.Copy(all, more)
	return all
}

func TestCreate_aSessionThatStandsIsReused(t *testing.T) {
	reused := func(effects ...string) outcome {
		return outcome{
			Result:  "reused",
			Effects: effects,
			Spans:   createSpan("", sessionAttrs(attrs{"sandbox.result": "reused"})),
			Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=reused} 1"},
			Logs:    []string{"info sandbox_reused chat_id=chat-a session_id=s1 container_id=container-1"},
			Records: []string{"chat-a s1 running container-1 12:30:00"},
			Running: []string{"chat-a s1"},
		}
	}
	longer := createA
	longer.TTL = maxTTL
	for _, tc := range []createCase{{
		name:  "without the lock, and its expiry stays",
		given: []func(*world){created(createA), later(10 * time.Minute)},
		want:  reused("get", "driver.inspect"),
	}, {
		name:  "also where a longer time to live is asked for",
		given: []func(*world){created(createA)},
		cmd:   longer,
		want:  reused("get", "driver.inspect"),
	}, {
		name:  "up to its last moment",
		given: []func(*world){created(createA), later(defaultTTL - 1)},
		want:  reused("get", "driver.inspect"),
	}, {
		name:  "where the runtime cannot tell: doubt is not death",
		given: []func(*world){created(createA), fails("driver.inspect", runtime.ErrUnavailable)},
		want:  reused("get", "driver.inspect"),
	}} {
		t.Run(tc.name, tc.run)
	}
}

func TestCreate_aSessionThatStandsWithOtherParametersIsAConflict(t *testing.T) {
	for _, tc := range []struct {
		name           string
		agent, volume  string
		wantReason     string
		wantErrMessage string
	}{
		{"the agent", "agent-2", "/data/a", "agent_id", "agent_id"},
		{"the volume", "agent-1", "/data/b", "volume_host_path", "volume_host_path"},
		{"both", "agent-2", "/data/b", "agent_id,volume_host_path", "agent_id,volume_host_path"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(createA), later(time.Minute))

			_, err := w.Create(t.Context(), scheduler.CreateCommand{
				ChatID: chatA, AgentID: tc.agent, VolumeHostPath: tc.volume,
			})

			must.Eq(t, outcome{
				Result:  "error conflict",
				Effects: []string{"get", "driver.inspect"},
				Spans: []span{{Name: "usecase.create_sandbox", Attrs: sessionAttrs(attrs{
					"chat.id":                 "chat-a",
					"agent.id":                tc.agent,
					"volume.host_path":        tc.volume,
					"sandbox.result":          "conflict",
					"sandbox.conflict.reason": tc.wantReason,
				})}},
				Metrics: []string{
					"sandbox.active.count 1",
					"sandbox.create.total{reason=" + tc.wantReason + " result=conflict} 1",
				},
				Logs: []string{"warn sandbox_conflict chat_id=chat-a session_id=s1 container_id=container-1" +
					" requested_agent_id=" + tc.agent + " session_agent_id=agent-1" +
					" requested_volume_host_path=" + tc.volume + " session_volume_host_path=/data/a" +
					" reason=" + tc.wantReason},
				Records: []string{"chat-a s1 running container-1 12:30:00"},
				Running: []string{"chat-a s1"},
			}, w.outcome("", err))
			conflict, ok := errors.AsType[*scheduler.ConflictError](err)
			must.True(t, ok)
			must.Eq(t, w.standing(chatA), conflict.Session)
			must.Eq(t, tc.wantReason, conflict.Reason)
			must.StrContains(t, err.Error(), tc.wantErrMessage)
		})
	}
}

func TestCreate_aSessionThatEndedIsReplaced(t *testing.T) {
	other := scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-2", VolumeHostPath: "/data/b"}
	replaced := func(reason, expiry string, effects ...string) outcome {
		return outcome{
			Result:  "replaced",
			Effects: effects,
			Spans: []span{{Name: "usecase.create_sandbox", Attrs: attrs{
				"chat.id":                           "chat-a",
				"agent.id":                          "agent-2",
				"volume.host_path":                  "/data/b",
				"sandbox.result":                    "replaced",
				"sandbox.previous_session.id":       "s1",
				"sandbox.previous_container.id":     "container-1",
				"sandbox.previous_agent.id":         "agent-1",
				"sandbox.previous_volume.host_path": "/data/a",
				"sandbox.new_session.id":            "s2",
				"sandbox.new_container.id":          "container-2",
				"sandbox.new_agent.id":              "agent-2",
				"sandbox.new_volume.host_path":      "/data/b",
				"session.id":                        "s2",
				"container.id":                      "container-2",
				"sandbox.session_agent.id":          "agent-2",
				"sandbox.session_volume.host_path":  "/data/b",
				"sandbox.endpoint.ip":               "127.0.0.1",
				"sandbox.endpoint.port":             "20002",
			}}},
			Metrics: []string{"sandbox.active.count 1", "sandbox.create.total{result=replaced} 1"},
			Logs: []string{
				"info sandbox_replaced chat_id=chat-a session_id=s1 container_id=container-1 reason=" + reason,
				"info sandbox_created chat_id=chat-a session_id=s2 container_id=container-2",
			},
			Records: []string{"chat-a s2 running container-2 " + expiry},
			Running: []string{"chat-a s2"},
		}
	}
	looked := []string{"get", "driver.inspect", "lock", "driver.inspect", "driver.find", "driver.inspect", "write stopping", "driver.stop",
		"write creating", "driver.create", "write running + release"}
	for _, tc := range []createCase{{
		name:  "at its expiry, not only after it",
		given: []func(*world){created(createA), later(defaultTTL)},
		want:  replaced("", "13:00:00", looked...),
	}, {
		name:  "with its sandbox dead",
		given: []func(*world){created(createA), killed("exit code 137: OOM killed")},
		want:  replaced("exit code 137: OOM killed", "12:30:00", looked...),
	}, {
		name:  "with its sandbox lost",
		given: []func(*world){created(createA), lost("node node-1 is down")},
		want:  replaced("node node-1 is down", "12:30:00", looked...),
	}, {
		name:  "with its sandbox gone from the runtime",
		given: []func(*world){created(createA), forgotten},
		want: replaced("the runtime no longer knows the sandbox", "12:30:00", "get", "driver.inspect", "lock", "driver.inspect",
			"driver.find", "driver.inspect", "write stopping", "driver.answers", "write creating", "driver.create", "write running + release"),
	}, {
		name:  "with a foreign container in its sandbox's place, which is never handed out",
		given: []func(*world){created(createA), swapped},
		want:  replaced("another sandbox has taken its place: foreign-1", "12:30:00", looked...),
	}, {
		name:  "with a stop that somebody began",
		given: []func(*world){created(createA), abandonedStop},
		want: replaced("", "12:30:00", "get", "lock", "driver.find", "driver.inspect", "driver.stop",
			"write creating", "driver.create", "write running + release"),
	}} {
		tc.cmd = other
		t.Run(tc.name, tc.run)
	}
}

// A sandbox may need longer to start than its session lives.
func TestCreate_counts_the_ttl_from_when_the_sandbox_is_ready(t *testing.T) {
	w := newWorld(t)
	w.effects.hook(effect{Name: "driver.create"}, hook{after: func(context.Context) error {
		w.clock.advance(time.Minute)
		return nil
	}})
	short := createA
	short.TTL = scheduler.MinTTL
	res, err := w.Create(t.Context(), short)
	must.NoError(t, err)
	must.Eq(t, noon, res.Session.CreatedAt)
	must.Eq(t, noon.Add(time.Minute+scheduler.MinTTL), res.Session.ExpiresAt)
	must.Eq(t, res.Session, w.standing(chatA))
}
