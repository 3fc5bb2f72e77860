package nomad_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// explains checks that the driver tells what happened to a session: one line for each of
// the words, in this order.
func explains(t *testing.T, r replica, sessionID string, words ...string) {
	t.Helper()
	told, err := r.Explain(patiently(t), sessionID)
	must.NoError(t, err)
	var lines []string
	for i, one := range told {
		lines = append(lines, one.Time.Format(time.RFC3339)+" "+one.Text)
		must.True(t, i == 0 || !one.Time.Before(told[i-1].Time), must.Sprint("the order of time"))
	}
	all := strings.Join(lines, "\n")
	t.Log("\n" + all)
	rest := all
	for _, next := range words {
		_, after, ok := strings.Cut(rest, " "+next)
		must.True(t, ok, must.Sprintf("%q is missing, or not in this place, in:\n%s", next, all))
		rest = after
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	t.Run("a sandbox that runs", func(t *testing.T) {
		t.Parallel()
		r := openShared(t, rawExec(t, nil))
		spec, sandbox := create(t, r)
		explains(t, r, spec.SessionID, "job registered", "placed on node ",
			"readiness check: it answers at "+sandbox.Endpoint.AddrPort().String())
	})
	t.Run("a sandbox that an operator stopped and another replica deleted", func(t *testing.T) {
		t.Parallel()
		r := openShared(t, rawExec(t, nil))
		other := open(t, r.client, r.template, r.instance)
		spec, sandbox := create(t, r)
		_, _, err := r.client.Jobs().Deregister(jobs.ID(spec.SessionID), false, nil)
		must.NoError(t, err)
		must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.Gap(50*time.Millisecond), wait.BoolFunc(func() bool {
			seen, err := r.Inspect(patiently(t), spec.SessionID)
			must.NoError(t, err)
			return seen.State == runtime.StateDead
		})))
		words := []string{"placed on node ", "as allocation " + sandbox.ContainerID, "job stopped\n", `task "sandbox": killing: Sent interrupt`, "allocation to be stopped: ", `task "sandbox": terminated: `}
		explains(t, r, spec.SessionID, words...)

		must.NoError(t, other.Delete(patiently(t), spec.SessionID))
		must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.Gap(50*time.Millisecond), wait.ErrorFunc(func() error {
			if _, err := r.Inspect(patiently(t), spec.SessionID); !errors.Is(err, runtime.ErrNotFound) {
				return errors.New("it is still there")
			}
			return nil
		})))
		explains(t, r, spec.SessionID, append(words, "job removed")...)
	})
	t.Run("a session ID that was used up before its start", func(t *testing.T) {
		t.Parallel()
		r := openShared(t, rawExec(t, nil))
		id := uuid.NewString()
		must.NoError(t, r.Stop(patiently(t), id))
		explains(t, r, id, "its session ID was used up by a stopped job")
	})
	t.Run("a session that nobody knows", func(t *testing.T) {
		t.Parallel()
		r := openShared(t, rawExec(t, nil))
		_, err := r.Explain(patiently(t), uuid.NewString())
		must.ErrorIs(t, err, runtime.ErrNotFound)
	})
	t.Run("not the session of another instance", func(t *testing.T) {
		t.Parallel()
		r := openShared(t, rawExec(t, nil))
		spec, _ := create(t, r)
		_, err := open(t, r.client, r.template, "test-"+uuid.NewString()).Explain(patiently(t), spec.SessionID)
		must.ErrorIs(t, err, runtime.ErrConflict)
	})
	t.Run("what a sandbox answers, without its access token", func(t *testing.T) {
		t.Parallel()
		self, err := os.Executable()
		must.NoError(t, err)
		r := openShared(t, templateOf(t, "5s", task("raw_exec", shell("exec "+self+" broken-sandbox"), "")))
		spec := newSpec(t, r)
		spec.AccessToken = runtime.Secret(strings.Repeat("5ec2e7ab", 8))
		_, err = r.Create(patiently(t), spec, ignore)
		must.ErrorIs(t, err, runtime.ErrNotReady)
		explains(t, r, spec.SessionID, `readiness check: GET /healthz: 500 Internal Server Error: "no database for [access token]"`)
	})
}
