package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/uuid"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// TestSandboxThatNomadRestartsIsNotReused shows what happens when an operator
// restarts a sandbox in Nomad. Nomad starts the process again in the same
// allocation, which stays running all the time. The session belonged to the
// first process, which is gone.
func TestSandboxThatNomadRestartsIsNotReused(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		w := newWorld(t, template)
		one, two := w.start(), w.start()
		chat := uuid.NewString()
		created := one.create(chat, w.body(), http.StatusCreated).Session

		// When an operator restarts it in Nomad …
		must.NoError(t, w.nomad.Allocations().Restart(&nomad.Allocation{ID: created.ContainerID}, "", nil))

		// … its session is dead for every replica, with the reason, and the
		// second run is stopped.
		const reason = "was ended by Nomad to be restarted: User requested running tasks to restart"
		for _, r := range []*replica{one, two} {
			eventually(t, "the session is dead", func() error {
				if seen := r.get(chat); seen.State != "dead" || !strings.Contains(seen.Reason, reason) {
					return fmt.Errorf("it is %s: %s", seen.State, seen.Reason)
				}
				return nil
			})
		}
		must.SliceEmpty(t, processes(t, created))
		refused := call[wire.ErrorAnswer](two, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{TTL: "1h"}, http.StatusConflict)
		must.Eq(t, wire.CodeNotRunning, refused.Error.Code)
		must.StrContains(t, refused.Error.Message, reason)

		// When it is created again, it is replaced.
		next := two.create(chat, w.body(), http.StatusCreated)
		must.Eq(t, "replaced", next.Result)
		must.NotEq(t, created.ContainerID, next.Session.ContainerID)
		must.Len(t, 1, w.liveAllocs(chat))
		one.delete(chat)
	})
}
