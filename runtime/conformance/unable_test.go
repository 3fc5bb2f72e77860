package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/bivouac/bivouac/runtime"
)

// unable is a driver without abilities.
type unable struct{ runtime.Driver }

// forwards is a driver that forwards to one without abilities.
type forwards struct{ runtime.Driver }

func (forwards) Watch(context.Context, func(runtime.Sandbox)) error { return errors.ErrUnsupported }

func (forwards) Logs(context.Context, string, runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return failing(errors.ErrUnsupported)
}

func (forwards) Exec(context.Context, string, runtime.Command, runtime.Streams) (int, error) {
	return 0, errors.ErrUnsupported
}

func (forwards) Explain(context.Context, string) ([]runtime.Happening, error) {
	return nil, errors.ErrUnsupported
}

func (forwards) Claim(context.Context, runtime.Spec) (runtime.Sandbox, error) {
	return runtime.Sandbox{}, errors.ErrUnsupported
}

// plain is a driver that keeps no output and has no terminals.
type plain struct{ sound }

func (plain) Logs(context.Context, string, runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return failing(fmt.Errorf("%w: set logs", runtime.ErrLogsDisabled))
}

func (d plain) Exec(ctx context.Context, sessionID string, command runtime.Command, streams runtime.Streams) (int, error) {
	if command.TTY {
		return 0, fmt.Errorf("%w: no terminals", runtime.ErrInvalid)
	}
	return d.sound.Exec(ctx, sessionID, command, streams)
}

// shellBound is a driver that needs a shell in its sandboxes to run something else.
type shellBound struct{ sound }

func (shellBound) Exec(context.Context, string, runtime.Command, runtime.Streams) (int, error) {
	return 0, fmt.Errorf("%w: there is no shell", runtime.ErrInvalid)
}

func failing(err error) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) { yield(runtime.LogChunk{}, err) }
}
