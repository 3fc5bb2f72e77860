package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// ending is a method of a driver that ends a sandbox: [runtime.Driver.Stop] or
// [runtime.Driver.Delete].
type ending func(driver runtime.Driver, ctx context.Context, sessionID string) error

// stop ends a sandbox, within stopLimit, while the lease's lock is held. If the
// sandbox has not ended by then, the record of its session says what it waits for.
func stop(ctx context.Context, lease Lease, driver runtime.Driver, end ending, sessionID string) error {
	if err := held(lease); err != nil {
		return fmt.Errorf("stop the sandbox: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if err := noteWait(ctx, lease, sessionID, end(driver, limited, sessionID)); err != nil {
		return runtimeError(ctx, "stop the sandbox", unlessHeld(lease, err))
	}
	return nil
}

// noteWait returns stopErr. If that says that the sandbox has not ended, it first
// writes into the lease's record why, provided that the record is that of the
// session. It works although ctx may have ended.
func noteWait(ctx context.Context, lease Lease, sessionID string, stopErr error) error {
	current := lease.Session()
	if !errors.Is(stopErr, runtime.ErrNotStopped) || current == nil || current.SessionID.String() != sessionID || current.Reason == stopErr.Error() {
		return stopErr
	}
	waiting := *current
	waiting.Reason = stopErr.Error()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if err := write(ctx, lease, &waiting, Keep); err != nil {
		return errors.Join(stopErr, fmt.Errorf("write what the stop waits for: %w", err))
	}
	return stopErr
}

// isKnown says whether the driver knows the sandbox of a recorded session, which
// is about to be stopped. If the sandbox serves another chat it must not be,
// whatever the record says, since somebody edited that: it returns ErrDamaged.
func isKnown(ctx context.Context, driver runtime.Driver, session Session) (bool, error) {
	sandbox, known, err := inspect(ctx, driver, session)
	if err == nil && known && isOfAnotherChat(sandbox, session) {
		return false, fmt.Errorf("%w: session %s in the record of chat %s is that of chat %s: it is left alone",
			ErrDamaged, session.SessionID, session.ChatID, sandbox.ChatID)
	}
	return known, err
}

// inspect returns a recorded session's sandbox as its driver sees it now, within
// stopLimit. known is false if the driver does not know it.
func inspect(ctx context.Context, driver runtime.Driver, session Session) (sandbox runtime.Sandbox, known bool, err error) {
	limited, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	sandbox, err = driver.Inspect(limited, session.SessionID.String())
	if errors.Is(err, runtime.ErrNotFound) {
		return runtime.Sandbox{}, false, nil
	}
	return sandbox, err == nil, runtimeError(ctx, "look at the recorded sandbox", err)
}

func isOfAnotherChat(sandbox runtime.Sandbox, session Session) bool {
	return sandbox.ChatID != session.ChatID.String()
}

// endSandbox ends the sandbox of a recorded session by the given method of its
// driver. known is what [isKnown] said of it.
//
// If the driver does not know the sandbox of a session that was handed out,
// nothing is stopped and no session ID is used up: the driver's Create, which
// asks for a sandbox once, had returned before the record said running, so that
// no start can arrive any more. An intent has no such answer. Its session ID is
// used up, so that a start that arrives late fails.
func endSandbox(ctx context.Context, lease Lease, driver runtime.Driver, end ending, session Session, known bool) error {
	if known || session.State == StateCreating {
		return stop(ctx, lease, driver, end, session.SessionID.String())
	}
	return awaitSilence(ctx, lease, driver, session)
}

// probeInterval is how often a sandbox is asked whether it still answers.
const probeInterval = 250 * time.Millisecond

// awaitSilence returns once the sandbox of a session, which its driver no longer
// knows, does not answer any more. What a runtime was told to forget, as by
// "nomad job stop -purge", may take its time to end. It waits stopLimit at most.
//
// A driver that is no [runtime.Prober] is believed at once, and so is a record
// that says that the sandbox was seen dead.
func awaitSilence(ctx context.Context, lease Lease, driver runtime.Driver, session Session) error {
	prober, ok := driver.(runtime.Prober)
	if !ok || session.State == StateDead || !session.Endpoint.IsValid() { // safeguard: question to a sandbox that its runtime forgot
		return nil
	}
	if err := held(lease); err != nil {
		return fmt.Errorf("ask the sandbox: %w", err)
	}
	asking, stopAsking := context.WithTimeout(ctx, stopLimit)
	defer stopAsking()
	silent := false
	var failed error
	_ = every(asking, probeInterval, func(ctx context.Context) { // it only ends with its context
		answers, err := prober.Answers(ctx, session.SessionID.String(), session.Endpoint)
		if ctx.Err() == nil && (err != nil || !answers) {
			silent, failed = err == nil, err
			stopAsking()
		}
	})
	switch {
	case silent:
		return nil
	case failed != nil:
		return runtimeError(ctx, "ask the sandbox", unlessHeld(lease, failed))
	}
	return lockLost(ctx, unlessHeld(lease, fmt.Errorf("%w: runtime %s no longer knows the sandbox of session %s, but it still answers at %s: end its process, or wait until it ends",
		runtime.ErrUnavailable, session.Runtime, session.SessionID, session.Endpoint.AddrPort())))
}
