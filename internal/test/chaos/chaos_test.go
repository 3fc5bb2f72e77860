package main

import (
	"testing"
	"time"

	"github.com/shoenig/test/must"
)

// shortRun is how long the run lasts that is part of the tests, and longer where
// not every fault has come by then. The full one is make chaos.
const shortRun = 5 * time.Minute

// Faults may cost callers time and single sandboxes, and nothing else: no chat has
// two sandboxes, nothing is left behind, no session is lost, no answer is wrong, and
// once they are over every replica serves every chat.
func TestChaos(t *testing.T) {
	p := plan{
		seed: uint64(time.Now().UnixNano()), duration: shortRun, stir: 100 * time.Second, times: 1,
		chats: 12, workers: 4, burst: 60, // other tests run beside this one
	}
	report, err := run(t.Context(), p)
	t.Logf("\n%s", report)
	must.NoError(t, err)
}
