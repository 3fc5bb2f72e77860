package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// ending is a driver's method that ends a sandbox: [runtime.Driver.Stop] or
// [runtime.Driver.Delete].
type ending func(driver runtime.Driver, ctx context.Context, sessionID string) error

// stop ends a sandbox within stopLimit, if the lease still holds the lock. If the
// sandbox has not ended by then, stop records what it waits for.
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

// noteWait returns stopErr. If stopErr says that the sandbox has not ended, noteWait
// first writes the reason into the lease's record, provided that the record is of this
// session. It works even if ctx has ended.
func noteWait(ctx context.Context, lease Lease, sessionID string, stopErr error) error {
	current := lease.Session()
	if current != nil {
		stopErr = hidingToken(stopErr, current.AccessToken)
	}
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

// isKnown reports whether the driver knows the sandbox of a recorded session that is
// about to be stopped. It returns ErrDamaged if the sandbox serves another chat:
// somebody edited the record, and the sandbox must not be stopped.
func isKnown(ctx context.Context, driver runtime.Driver, session Session) (bool, error) {
	sandbox, known, err := inspect(ctx, driver, session)
	if err == nil && known && isOfAnotherChat(sandbox, session) {
		return false, fmt.Errorf("%w: session %s in the record of chat %s is that of chat %s: it is left alone",
			ErrDamaged, session.SessionID, session.ChatID, sandbox.ChatID)
	}
	return known, err
}

// isOthersSpare reports whether isKnown has found the spare of a warm intent with another
// chat. The record of the spare returned with an old state of the store, and that of the
// other chat's session is gone. The runtime has refused the claim, so nothing of the intent
// runs, and the sandbox is left alone.
func isOthersSpare(intent Session, err error) bool {
	return errors.Is(err, ErrDamaged) && intent.Warm && intent.State == StateCreating // safeguard: spare of another chat
}

// inspect returns a recorded session's sandbox as its driver sees it now. It waits at
// most stopLimit. known is false if the driver does not know the sandbox.
func inspect(ctx context.Context, driver runtime.Driver, session Session) (sandbox runtime.Sandbox, known bool, err error) {
	limited, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	sandbox, err = driver.Inspect(limited, session.SessionID.String())
	if errors.Is(err, runtime.ErrNotFound) {
		return runtime.Sandbox{}, false, nil
	}
	return sandbox, err == nil, runtimeError(ctx, "look at the recorded sandbox", err)
}

// isOfAnotherChat reports whether a sandbox with the session's ID serves another chat.
// A driver may know a claimed spare by its pool alone.
func isOfAnotherChat(sandbox runtime.Sandbox, session Session) bool {
	if session.Warm && sandbox.ChatID == "" {
		return sandbox.Pool == ""
	}
	return sandbox.ChatID != session.ChatID.String()
}

// endSandbox ends the sandbox of a recorded session with the driver's method end. known
// is the result of [isKnown].
//
// If a session was running and its driver no longer knows the sandbox, endSandbox stops
// nothing and uses up no session ID. The driver's Create asks for a sandbox only once
// and had returned before the record said running, so no start can arrive any more. For
// an intent that is not certain. endSandbox uses up its session ID, so that a start
// that arrives late fails.
func endSandbox(ctx context.Context, lease Lease, driver runtime.Driver, end ending, session Session, known bool) error {
	if known || session.State == StateCreating {
		return stop(ctx, lease, driver, end, session.SessionID.String())
	}
	return awaitSilence(ctx, lease, driver, session)
}

// probeInterval is how often awaitSilence checks whether a sandbox still answers.
const probeInterval = 250 * time.Millisecond

// awaitSilence returns once the sandbox of a session no longer answers. The driver no
// longer knows the sandbox, but the sandbox may take time to end, for example after
// "nomad job stop -purge". awaitSilence waits at most stopLimit.
//
// It returns at once if the driver is not a [runtime.Prober], or if the record says
// that the sandbox is dead.
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
