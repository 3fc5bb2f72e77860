package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/backoff"
)

func eventsCommand(t terminal) *command {
	c := newCommand(t, "events")
	c.synopsis = "Show what happened to sessions"
	c.about = `Shows what happened to sessions, oldest first, as far back as the server keeps it.
With -f it shows what happens from now on, until Ctrl-C. If the server goes away,
it says so and continues when a server answers again. If events are missing, it
says so and continues with the oldest that are kept. With -json it prints the
lines of the API.`
	c.example = "$ bivouac events -f -type=dead,lost"
	var in apiclient.EventsInput
	c.flags.BoolVar(&in.Follow, "f", false, "Show what happens from now on, and after -index.")
	c.flags.Func("index", "Only events after this `INDEX`.", func(text string) error {
		index, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return errors.New("it must be a number that is not negative")
		}
		in.After = &index
		return nil
	})
	c.flags.StringVar(&in.AgentID, "agent-id", "", "Only sessions of the AI agent with this `ID`.")
	c.flags.Func("chat-id", "Only the chat with this `ID`.", func(text string) (err error) {
		in.ChatID, err = parseChatID(text)
		return err
	})
	c.flags.Func("type", "Only events of these `TYPES`, separated by commas.", func(text string) error {
		in.Types = strings.Split(text, ",")
		return nil
	})
	c.callAPI(func(ctx context.Context, api *apiclient.Client, _ uuid.UUID) error {
		if !in.Follow && in.After == nil {
			in.After = new(uint64)
		}
		show := c.showEvents()
		if c.asJSON {
			lines := json.NewEncoder(c.out)
			lines.SetEscapeHTML(false)
			show = func(batch wire.EventBatch) error {
				if len(batch.Events) == 0 {
					return nil
				}
				return lines.Encode(batch)
			}
		}
		return c.followEvents(ctx, api, in, show)
	})
	return c
}

// followEvents shows events until they end, or with in.Follow until ctx ends.
func (c *command) followEvents(ctx context.Context, api *apiclient.Client, in apiclient.EventsInput, show func(wire.EventBatch) error) error {
	pauses := backoff.Backoff{Min: firstRetry, Max: longestRetry}
	connected := false
	read := func() error {
		for batch, err := range api.Events(ctx, in) {
			if err != nil {
				return err
			}
			connected, in.After = true, &batch.Index
			pauses.Reset()
			if err := show(batch); err != nil {
				return err
			}
		}
		return nil
	}
	for {
		err := read()
		if err == nil || ctx.Err() != nil {
			return nil //nolint:nilerr // to be interrupted is no failure
		}
		pause := retryPause(err, connected, &pauses)
		switch e, ok := errors.AsType[*apiclient.Error](err); {
		case ok && e.Code == wire.CodeIndexTooOld && in.Follow:
			c.tellMissing(err)
			in.After, pause = new(uint64), pauses.Next()
		case pause == 0:
			return err
		default:
			c.tellRetry(err, pause)
		}
		_ = backoff.Sleep(ctx, pause) // read fails if ctx has ended
	}
}

// tellMissing says that events were missed.
func (c *command) tellMissing(err error) {
	if c.asJSON {
		c.tellJSON(err)
		return
	}
	c.tell("Some events are missing: %v.\nGoing on with the oldest that are kept.", err)
}

// showEvents returns a function that shows batches as a table. It shows the first line
// with the first batch, even if that has no events.
func (c *command) showEvents() func(wire.EventBatch) error {
	heading := sync.OnceValue(func() error { return c.showEventLine("TIME", "TYPE", "CHAT", "AGENT", "REASON") })
	return func(batch wire.EventBatch) error {
		if err := heading(); err != nil {
			return err
		}
		for _, e := range batch.Events {
			p, key := e.Payload, e.Key
			if e.Topic == wire.TopicPool {
				key = "pool " + key
			}
			if err := c.showEventLine(moment(p.Time), e.Type, key, column(p.AgentID), orDash(p.Reason)); err != nil {
				return err
			}
		}
		return nil
	}
}

// showEventLine shows a line of a table whose columns have fixed widths, because later
// lines are not known.
func (c *command) showEventLine(at, what, chat, agent, reason string) error {
	_, err := fmt.Fprintln(c.out, printable(fmt.Sprintf("%-20s  %-14s  %-36s  %-16s  %s", at, what, chat, agent, reason)))
	return err
}
