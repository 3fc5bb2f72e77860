//go:build faults

package main

import (
	"testing"
	"time"

	"github.com/shoenig/test/must"
)

// shortRun is how long the run lasts that is part of the tests. The full one is
// make chaos.
const shortRun = 3 * time.Minute

// Faults may cost callers time and single sandboxes, and nothing else: no chat has
// two sandboxes, nothing is left behind, no session is lost, no answer is wrong.
func TestChaos(t *testing.T) {
	p := fullRun()
	p.seed, p.duration, p.stir = uint64(time.Now().UnixNano()), shortRun, 80*time.Second
	report, err := run(t.Context(), p)
	t.Logf("\n%s", report)
	must.NoError(t, err)
}
