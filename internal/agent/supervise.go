package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// part is a part of the server that runs as long as the server. run returns once its
// context has ended and its work is done.
type part struct {
	name string
	run  func(ctx context.Context) error
}

// supervise runs the parts until ctx or one of the parts ends. Then it stops them one
// after the other, the last one first, because each part needs those before it. It
// returns the parts' errors.
func supervise(ctx context.Context, parts []part, stopLimit time.Duration) error {
	type running struct {
		name   string
		cancel context.CancelFunc
		done   chan error
	}
	ended := make(chan struct{}, len(parts))
	all := make([]running, len(parts))
	// Not derived from ctx, which would end all parts at the same time.
	alive, endAll := context.WithCancel(context.WithoutCancel(ctx))
	defer endAll()
	for i, p := range parts {
		partCtx, cancel := context.WithCancel(alive)
		all[i] = running{p.name, cancel, make(chan error, 1)}
		go func() {
			err := p.run(partCtx)
			switch {
			case partCtx.Err() == nil && err == nil: // nobody stopped it
				err = errors.New("it ended by itself")
			case partCtx.Err() == nil:
				err = fmt.Errorf("it ended by itself: %w", err)
			case errors.Is(err, context.Canceled):
				err = nil
			}
			all[i].done <- err
			ended <- struct{}{}
		}()
	}

	select {
	case <-ctx.Done():
	case <-ended:
	}
	limit := time.NewTimer(stopLimit)
	defer limit.Stop()
	var errs []error
	for _, r := range slices.Backward(all) {
		r.cancel()
		select {
		case err := <-r.done:
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.name, err))
			}
		case <-limit.C:
			return errors.Join(append(errs, fmt.Errorf("%s did not stop within %s", r.name, stopLimit))...)
		}
	}
	return errors.Join(errs...)
}
