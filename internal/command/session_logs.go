package command

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/runtime"
)

// errLogEnded is returned if a log ended that should have gone on.
var errLogEnded = errors.New("the server ended the log")

func sessionLogsCommand(t terminal) *command {
	c := newCommand(t, "session logs")
	c.args = "CHAT_ID"
	c.synopsis = "Show what a chat's sandbox prints"
	c.about = `Prints what the sandbox of the chat has printed to its stdout, as it is. That may
include control characters for your terminal. With -f it continues with new output
until the session ends, and then says on stderr how. Ctrl-C ends it before that.
With -json it prints the frames of the API, which have the time of each piece.`
	c.example = "$ bivouac session logs -f -tail=10 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	in := apiclient.LogsInput{Tail: -1}
	c.flags.BoolVar(&in.Follow, "f", false, "Follow: continue with new output until the session ends.")
	c.flags.Func("tail", "Number `N` of last lines to begin with. (default all that is kept)", func(text string) error {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			return errors.New("it must be a number that is not negative")
		}
		in.Tail = n
		return nil
	})
	stderr := c.flags.Bool("stderr", false, "Show what it has printed to its stderr.")
	c.flags.StringVar(&in.Task, "task", "", "`NAME` of the task. (default the main task)")
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		in.Frames = c.asJSON
		if *stderr {
			in.Stream = runtime.Stderr
		}
		end, err := api.Logs(ctx, chat, in, c.out)
		switch {
		case ctx.Err() != nil: // to be interrupted is no failure
			return nil //nolint:nilerr // as above
		case err != nil:
			return err
		case !in.Follow || c.asJSON:
			return nil
		case end.State == "running":
			return fmt.Errorf("%w: %s", errLogEnded, end.Reason)
		}
		if end.Reason != "" {
			end.State += ": " + end.Reason
		}
		c.tell("The session has ended: %s", end.State)
		return nil
	})
	return c
}
