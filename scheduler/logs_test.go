package scheduler_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

var allLogs = scheduler.LogQuery{Stream: runtime.Stdout, Tail: -1}

// print makes the sandbox of chat A print text.
func (w *world) print(stream runtime.LogStream, text string) {
	w.driver.Print(w.standing(chatA).SessionID.String(), stream, text)
}

// read returns the output that a query selects.
func (w *world) read(query scheduler.LogQuery) (string, scheduler.LogEnd, error) {
	var text strings.Builder
	end, err := w.Logs(context.Background(), chatA, query, func(chunk runtime.LogChunk) error {
		must.Eq(w.t, query.Stream, chunk.Stream)
		text.Write(chunk.Data)
		return nil
	})
	return text.String(), end, err
}

func TestLogs_readsWhatIsKept(t *testing.T) {
	long := strings.Repeat("0123456\n", 40_000) // 320,000 bytes
	for _, tc := range []struct {
		name    string
		printed string
		query   scheduler.LogQuery
		want    string
	}{
		{"all", "one\ntwo\n", allLogs, "one\ntwo\n"},
		{"all of much", long, allLogs, long},
		{"nothing", "", allLogs, ""},
		{"another stream", "one\n", scheduler.LogQuery{Stream: runtime.Stderr, Tail: -1}, ""},
		{"the named task", "one\n", scheduler.LogQuery{Stream: runtime.Stdout, Tail: -1, Task: "main"}, "one\n"},
		{"no line", "one\ntwo\n", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 0}, ""},
		{"the last line", "one\ntwo\n", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 1}, "two\n"},
		{"the last line, which has no end yet", "one\ntwo", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 1}, "two"},
		{"an empty line", "one\n\n", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 1}, "\n"},
		{"as many lines as there are", "one\ntwo\n", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 2}, "one\ntwo\n"},
		{"more lines than there are", "one\ntwo\n", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 3}, "one\ntwo\n"},
		{"lines of nothing", "", scheduler.LogQuery{Stream: runtime.Stdout, Tail: 3}, ""},
		{"the last lines of much", long, scheduler.LogQuery{Stream: runtime.Stdout, Tail: 40_000}, long[len(long)-256<<10:]},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(createA))
			w.print(runtime.Stdout, tc.printed)
			text, end, err := w.read(tc.query)
			must.NoError(t, err)
			must.Eq(t, tc.want, text)
			must.Eq(t, "running", end.State)
			must.Eq(t, chatA, end.Session.ChatID)
		})
	}
}

func TestLogs_ofASandboxThatEnded(t *testing.T) {
	w := newWorld(t)
	w.given(created(createA))
	w.print(runtime.Stdout, "last words\n")
	w.given(killed("exit code 3"))
	for _, follow := range []bool{false, true} {
		text, end, err := w.read(scheduler.LogQuery{Stream: runtime.Stdout, Tail: -1, Follow: follow})
		must.NoError(t, err)
		must.Eq(t, "last words\n", text)
		must.Eq(t, "dead: exit code 3", end.State+": "+end.Reason)
	}
}

func TestLogs_followsUntilTheSessionEnds(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*world)
		want string
	}{
		{"its sandbox dies", killed("exit code 3"), "dead: exit code 3"},
		{"it is deleted", func(w *world) {
			_, err := w.Delete(t.Context(), chatA)
			must.NoError(t, err)
		}, "deleted: "},
		{"it expires", func(w *world) {
			w.clock.advance(defaultTTL)
			_, err := w.CleanupExpired(t.Context())
			must.NoError(t, err)
		}, "expired: "},
		{"it is replaced", func(w *world) {
			w.clock.advance(defaultTTL)
			_, err := w.Create(t.Context(), createA)
			must.NoError(t, err)
			w.print(runtime.Stdout, "of the next session\n")
		}, "replaced: it had expired"},
		{"its sandbox is lost, and so is its log", func(w *world) {
			w.driver.Edit(w.standing(chatA).SessionID.String(), func(s *runtime.Sandbox) {
				s.State = runtime.StateDead // ends the log
			})
			w.effects.hook(effect{Name: "driver.logs"}, hook{after: func(context.Context) error {
				w.driver.Lose(w.standing(chatA).SessionID.String(), "node down")
				return runtime.ErrUnavailable
			}})
		}, "lost: node down"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(createA))
			w.print(runtime.Stdout, "one\ntwo\n")
			var pieces []string
			end, err := w.Logs(t.Context(), chatA, scheduler.LogQuery{Stream: runtime.Stdout, Tail: 1, Follow: true}, func(chunk runtime.LogChunk) error {
				pieces = append(pieces, string(chunk.Data))
				switch string(chunk.Data) {
				case "":
					w.print(runtime.Stdout, "new\n")
				case "new\n":
					w.print(runtime.Stdout, "last\n")
					tc.end(w)
				}
				return nil
			})
			must.NoError(t, err)
			must.Eq(t, []string{"two\n", "", "new\n", "last\n"}, pieces)
			must.Eq(t, tc.want, end.State+": "+end.Reason)
		})
	}
}

// withoutChanges is a store that no longer keeps how a session ended.
type withoutChanges struct{ scheduler.Store }

func (withoutChanges) Changes(context.Context, uint64, time.Duration) ([]scheduler.Change, error) {
	return nil, scheduler.ErrIndexTooOld
}

func TestLogs_doesNotNeedChanges(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*world)
		want string
	}{
		{"deleted", func(*world) {}, "deleted"},
		{"expired", later(defaultTTL), "expired"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, func(c *scheduler.Config) { c.Store = withoutChanges{c.Store} })
			w.given(created(createA))
			end, err := w.Logs(t.Context(), chatA, scheduler.LogQuery{Stream: runtime.Stdout, Tail: -1, Follow: true}, func(runtime.LogChunk) error {
				tc.end(w)
				_, err := w.Delete(t.Context(), chatA)
				return err
			})
			must.NoError(t, err)
			must.Eq(t, tc.want, end.State)
		})
	}
}

// withoutLogs is a driver without the ability.
type withoutLogs struct{ runtime.Driver }

func TestLogs_refuses(t *testing.T) {
	scope := func(capabilities scheduler.Capabilities) scheduler.Caller {
		return scheduler.Caller{Name: "caller", Method: "token", Policies: []*scheduler.Policy{{
			Agents: []scheduler.AgentRule{{Prefix: createA.AgentID, Capabilities: capabilities}},
		}}}
	}
	for _, tc := range []struct {
		name   string
		caller scheduler.Caller
		given  func(*world)
		query  scheduler.LogQuery
		want   error
		kind   string
	}{
		{"a chat without a session", scheduler.Caller{}, func(w *world) { _, _ = w.Delete(context.Background(), chatA) }, allLogs, scheduler.ErrNotFound, "not_found"},
		{"a session that the caller may not see", scope(scheduler.CapLogs), nil, allLogs, scheduler.ErrNotFound, "not_found"},
		{"a caller who may only see it", scope(scheduler.CapRead | scheduler.CapExec), nil, allLogs, scheduler.ErrPermissionDenied, "permission_denied"},
		{"a runtime without logs", scheduler.Caller{}, func(w *world) {
			w.Drivers["fake"] = withoutLogs{w.driver}
		}, allLogs, errors.ErrUnsupported, "unsupported"},
		{"a sandbox that keeps none", scheduler.Caller{}, fails("driver.logs", runtime.ErrLogsDisabled), allLogs, runtime.ErrLogsDisabled, "logs_disabled"},
		{"a sandbox that the runtime does not know", scheduler.Caller{}, forgotten, allLogs, scheduler.ErrNotRunning, "not_running"},
		{"an unknown task", scheduler.Caller{}, nil, scheduler.LogQuery{Stream: runtime.Stdout, Task: "web"}, runtime.ErrInvalid, "runtime_invalid"},
		{"a runtime that cannot be reached", scheduler.Caller{}, fails("driver.logs", errors.New("oops")), allLogs, runtime.ErrUnavailable, "runtime_unavailable"},
		{"a store that cannot be reached", scheduler.Caller{}, fails("get", scheduler.ErrUnavailable), allLogs, scheduler.ErrUnavailable, "store_unavailable"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.given(created(createA))
			if tc.given != nil {
				w.given(tc.given)
			}
			_, err := w.Logs(scheduler.WithCaller(t.Context(), tc.caller), chatA, tc.query, func(runtime.LogChunk) error {
				t.Error("something was written")
				return nil
			})
			must.ErrorIs(t, err, tc.want)
			must.Eq(t, tc.kind, scheduler.Kind(err))
		})
	}
	t.Run("a runtime that ends the log of a sandbox that runs", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		_, err := w.Logs(t.Context(), chatA, scheduler.LogQuery{Stream: runtime.Stdout, Tail: -1, Follow: true}, func(runtime.LogChunk) error {
			w.effects.fail("driver.logs", runtime.ErrUnavailable)
			return nil
		})
		must.ErrorIs(t, err, runtime.ErrUnavailable)
	})
}

func TestLogs_endsWithItsReader(t *testing.T) {
	t.Run("who has enough", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		enough := errors.New("enough")
		_, err := w.Logs(t.Context(), chatA, scheduler.LogQuery{Stream: runtime.Stdout, Follow: true}, func(runtime.LogChunk) error { return enough })
		must.ErrorIs(t, err, enough)
	})
	t.Run("whose context ends", func(t *testing.T) {
		w := newWorld(t)
		w.given(created(createA))
		ctx, cancel := context.WithCancel(t.Context())
		_, err := w.Logs(ctx, chatA, scheduler.LogQuery{Stream: runtime.Stdout, Follow: true}, func(runtime.LogChunk) error {
			cancel()
			return nil
		})
		must.ErrorIs(t, err, context.Canceled)
	})
}

func TestLogs_areReadByFewAtATime(t *testing.T) {
	for _, tc := range []struct {
		name     string
		caller   scheduler.Caller
		sessions int // that are read in turns
		limit    string
		most     int
	}{
		{"of a session", scheduler.Caller{}, 1, "session_log_reads", 4},
		{"of a caller", scheduler.Caller{Name: "caller", Method: "token"}, 10, "caller_log_reads", 8},
		{"of a replica", scheduler.Caller{}, 10, "log_reads", 16},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			var chats []uuid.UUID
			for range tc.sessions {
				cmd := createA
				cmd.ChatID = uuid.New()
				chats = append(chats, cmd.ChatID)
				w.given(created(cmd))
			}
			ctx := scheduler.WithCaller(t.Context(), tc.caller)
			done := errors.New("done")
			var open func(n int) error
			open = func(n int) error {
				_, err := w.Logs(ctx, chats[n%len(chats)], scheduler.LogQuery{Stream: runtime.Stdout, Follow: true}, func(runtime.LogChunk) error {
					if err := open(n + 1); err != nil {
						return err
					}
					return done
				})
				if limit, ok := errors.AsType[*scheduler.LimitError](err); ok {
					must.Eq(t, tc.limit, limit.Limit)
					must.Eq(t, tc.most, n)
					return done
				}
				return err
			}
			for range 2 { // all places are free again
				must.ErrorIs(t, open(0), done)
			}
		})
	}
}
