package scheduler_test

import (
	"errors"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// twoRuntimes is a world with a runtime "other" beside its default, "fake".
func twoRuntimes(t *testing.T) (*world, *fakeruntime.Driver) {
	other := fakeruntime.New("other")
	return newWorld(t, func(c *scheduler.Config) { c.Drivers["other"] = other }), other
}

// on is createA on a runtime.
func on(name string) scheduler.CreateCommand {
	cmd := createA
	cmd.Runtime = name
	return cmd
}

func TestCreate_runsOnTheRuntimeThatIsNamed(t *testing.T) {
	for _, tc := range []struct{ named, want string }{
		{"", "fake"},
		{"fake", "fake"},
		{"other", "other"},
	} {
		t.Run(tc.named, func(t *testing.T) {
			w, other := twoRuntimes(t)

			res, err := w.Create(t.Context(), on(tc.named))

			must.NoError(t, err)
			must.Eq(t, tc.want, res.Session.Runtime)
			must.Eq(t, tc.want, w.standing(chatA).Runtime)
			must.Eq(t, tc.want == "fake", w.driver.Created() == 1)
			must.Eq(t, tc.want == "other", other.Created() == 1)
		})
	}
}

func TestCreate_aSessionThatStandsOnAnotherRuntime(t *testing.T) {
	for _, tc := range []struct {
		name         string
		stands       string
		cmd          scheduler.CreateCommand
		wantConflict string // empty: it is reused
		wantLog      string
	}{
		{"is reused where the same one is named", "other", on("other"), "", ""},
		{"is reused where none is named, though the default is another", "other", on(""), "", ""},
		{"is a conflict where another is named", "other", on("fake"), "runtime",
			" requested_runtime=fake session_runtime=other reason=runtime"},
		{"is a conflict where another is named, also against the default", "", on("other"), "runtime",
			" requested_runtime=other session_runtime=fake reason=runtime"},
		{"is told last of all that differs", "other",
			scheduler.CreateCommand{ChatID: chatA, AgentID: "agent-2", VolumeHostPath: "/data/b", Runtime: "fake"},
			"agent_id,volume_host_path,runtime",
			" requested_runtime=fake session_runtime=other reason=agent_id,volume_host_path,runtime"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, _ := twoRuntimes(t)
			w.given(created(on(tc.stands)), later(time.Minute))

			res, err := w.Create(t.Context(), tc.cmd)

			if tc.wantConflict == "" {
				must.NoError(t, err)
				must.Eq(t, scheduler.ResultReused, res.Result)
				must.Eq(t, "other", res.Session.Runtime)
				return
			}
			conflict, ok := errors.AsType[*scheduler.ConflictError](err)
			must.True(t, ok)
			must.Eq(t, tc.wantConflict, conflict.Reason)
			must.Eq(t, w.standing(chatA), conflict.Session)
			must.StrHasSuffix(t, tc.wantLog, w.outcome("", err).Logs[0])
		})
	}
}

func TestCreate_aSessionThatEndedIsReplacedOnTheRuntimeThatIsNamed(t *testing.T) {
	w, other := twoRuntimes(t)
	w.given(created(createA), later(defaultTTL))

	res, err := w.Create(t.Context(), on("other"))

	must.NoError(t, err)
	must.Eq(t, scheduler.ResultReplaced, res.Result)
	must.Eq(t, "other", w.standing(chatA).Runtime)
	must.SliceEmpty(t, w.running(), must.Sprint("the runtime of the one before stopped it"))
	must.Eq(t, 1, other.Created())

	t.Run("and is ended by its own runtime, whatever the default is", func(t *testing.T) {
		_, err := w.Delete(t.Context(), chatA)
		must.NoError(t, err)
		_, err = other.Inspect(t.Context(), res.Session.SessionID.String())
		must.ErrorIs(t, err, runtime.ErrNotFound)
	})
}
