package process

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// explains checks that the driver tells what happened to a session: one thing for each of
// the words, which begin it, and nothing else.
func explains(t *testing.T, d *Driver, sessionID string, words ...string) {
	t.Helper()
	happened, err := d.Explain(t.Context(), sessionID)
	must.NoError(t, err)
	must.Len(t, len(words), happened, must.Sprint(happened))
	for i, want := range words {
		must.StrHasPrefix(t, want, happened[i].Text)
		must.Less(t, time.Minute, time.Since(happened[i].Time))
	}
}

func TestExplain(t *testing.T) {
	t.Run("a sandbox that runs, and is stopped and deleted", func(t *testing.T) {
		d := openDriver(t, t.TempDir())
		spec := newSpec(t, d)
		sandbox, err := d.Create(t.Context(), spec, ignore)
		must.NoError(t, err)
		address := sandbox.Endpoint.AddrPort().String()
		began := []string{"process " + sandbox.ContainerID + " started on port ", "it answers at " + address}
		explains(t, d, spec.SessionID, append(began, "readiness check: it answers at "+address)...)

		must.NoError(t, d.Stop(t.Context(), spec.SessionID))
		all := slices.Concat(began, []string{"told to end with SIGTERM", "ended: killed by signal 15"})
		explains(t, d, spec.SessionID, all...)
		must.NoError(t, d.Delete(t.Context(), spec.SessionID))
		must.NoError(t, d.Delete(t.Context(), spec.SessionID))
		explains(t, d, spec.SessionID, all...)
	})
	t.Run("a sandbox that has to be killed", func(t *testing.T) {
		d := openDriver(t, t.TempDir(), "/bin/sh", "-c", `exec 2>/dev/null; trap "" TERM; `+os.Args[0]+` & while true; do sleep 1; done`)
		d.grace = 50 * time.Millisecond
		spec := newSpec(t, d)
		_, err := d.Create(t.Context(), spec, ignore)
		must.NoError(t, err)
		must.NoError(t, d.Stop(t.Context(), spec.SessionID))
		explains(t, d, spec.SessionID, "process ", "it answers ", "told to end with SIGTERM", "killed with SIGKILL, because it had not ended within 50ms", "ended: killed by signal 9")
	})
	t.Run("a sandbox that ends with words, without its access token", func(t *testing.T) {
		d := openDriver(t, t.TempDir(), "/bin/sh", "-c", "echo no database for $BIVOUAC_ACCESS_TOKEN; exit 3")
		spec := newSpec(t, d)
		spec.AccessToken = runtime.Secret(strings.Repeat("5ec2e7ab", 8))
		_, err := d.Create(t.Context(), spec, ignore)
		must.ErrorIs(t, err, runtime.ErrNotReady)
		explains(t, d, spec.SessionID, "process ", "ended: exit code 3", "the last line of its output: no database for [access token]")
	})
	t.Run("a session that nobody knows", func(t *testing.T) {
		d := openDriver(t, t.TempDir())
		id := uuid.NewString()
		must.NoError(t, d.Delete(t.Context(), id))
		_, err := d.Explain(t.Context(), id)
		must.ErrorIs(t, err, runtime.ErrNotFound)
	})
}
