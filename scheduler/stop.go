package scheduler

import (
	"context"
	"errors"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

// ending is a method of a driver that ends a sandbox: [runtime.Driver.Stop] or
// [runtime.Driver.Delete].
type ending func(driver runtime.Driver, ctx context.Context, sessionID string) error

// stop ends a sandbox, within stopLimit, while the lease's lock is held. If the
// sandbox has not ended by then, the record says what it waits for.
func stop(ctx context.Context, lease Lease, driver runtime.Driver, end ending, session Session) error {
	if err := held(lease); err != nil {
		return fmt.Errorf("stop the sandbox: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	err := end(driver, limited, session.SessionID.String())
	if errors.Is(err, runtime.ErrNotStopped) {
		err = errors.Join(err, noteWait(ctx, lease, err.Error()))
	}
	if err != nil {
		return runtimeError(ctx, "stop the sandbox", unlessHeld(lease, err))
	}
	return nil
}

// noteWait writes into the lease's record why its sandbox has not ended. It works
// although ctx may have ended.
func noteWait(ctx context.Context, lease Lease, why string) error {
	waiting := *lease.Session()
	if waiting.Reason == why {
		return nil
	}
	waiting.Reason = why
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if err := write(ctx, lease, &waiting, Keep); err != nil {
		return fmt.Errorf("write what the stop waits for: %w", err)
	}
	return nil
}

// checkChat returns nil where a recorded session's sandbox may be stopped. One
// that serves another chat may not, whatever the record says, since somebody
// edited that: it gives ErrDamaged.
func checkChat(ctx context.Context, driver runtime.Driver, session Session) error {
	limited, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	sandbox, err := driver.Inspect(limited, session.SessionID.String())
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		return nil
	case err != nil:
		return runtimeError(ctx, "look at the sandbox that is to be stopped", err)
	case isOfAnotherChat(sandbox, session):
		return fmt.Errorf("%w: session %s in the record of chat %s is that of chat %s: it is left alone",
			ErrDamaged, session.SessionID, session.ChatID, sandbox.ChatID)
	}
	return nil
}

func isOfAnotherChat(sandbox runtime.Sandbox, session Session) bool {
	return sandbox.ChatID != session.ChatID.String()
}
