package process

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// readyCheck returns what counts as an answer of a sandbox.
func readyCheck() ready.Check { return ready.Check{HTTPPath: "/healthz", WantSessionID: true} }

// maxHappenings bounds what Explain returns.
const maxHappenings = 100

// note adds something that happened to the sandbox. The caller must hold sb.mu.
func (sb *sandbox) note(format string, args ...any) {
	sb.happened = slices.Delete(sb.happened, 0, max(0, len(sb.happened)-maxHappenings+2)) // room for this and the check
	sb.happened = append(sb.happened, runtime.Happening{Time: time.Now().UTC(), Text: fmt.Sprintf(format, args...)})
}

// Explain returns what happened to a sandbox. If the sandbox runs, it also makes the
// readiness check once. Of a deleted sandbox the driver remembers what happened for an
// hour.
func (d *Driver) Explain(ctx context.Context, sessionID string) ([]runtime.Happening, error) {
	d.mu.Lock()
	sb, ok := d.sandboxes[sessionID]
	past := d.gone[sessionID].happened
	d.mu.Unlock()
	switch {
	case !ok && past == nil:
		return nil, fmt.Errorf("process: explain %s: %w", sessionID, runtime.ErrNotFound)
	case !ok:
		return slices.Clone(past), nil
	}
	sb.mu.Lock()
	happened := slices.Clone(sb.happened)
	runs := sb.leader.PID != 0 && !sb.ended
	sb.mu.Unlock()
	if runs {
		text := fmt.Sprintf("readiness check: it answers at %s", sb.endpoint().AddrPort())
		if err := readyCheck().Once(ctx, sb.endpoint(), sessionID); err != nil {
			text = "readiness check: " + err.Error()
		}
		happened = append(happened, runtime.Happening{Time: time.Now().UTC(), Text: sb.spec.AccessToken.HideIn(text)})
	}
	return happened, nil
}
