package command

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
)

func sessionWhyCommand(t terminal) *command {
	c := newCommand(t, "session why")
	c.args = "CHAT_ID"
	c.synopsis = "Tell what became of a chat's last sessions"
	c.about = `Tells what became of the chat's last sessions, the newest first: what Bivouac did
with them, and what their runtime says about placement, tasks and readiness. It
can take some seconds.`
	c.example = "$ bivouac session why 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		told, err := api.Why(ctx, chat)
		if err != nil {
			return err
		}
		if c.asJSON {
			return showJSON(c.out, told)
		}
		now := time.Now()
		for i, story := range told.Sessions {
			if i > 0 {
				if _, err := fmt.Fprintln(c.out); err != nil {
					return err
				}
			}
			if err := showTable(c.out, storyLines(story)); err != nil {
				return err
			}
			if err := showTable(c.out, "\n"+storyEvents(story.Events, now)); err != nil {
				return err
			}
		}
		return nil
	})
	return c
}

func storyLines(s wire.Story) string {
	return fmt.Sprintf("Session\t%s\nAgent\t%s\nRuntime\t%s\nState\t%s\nOutcome\t%s\n", s.SessionID, s.AgentID, s.Runtime, s.State, s.Outcome)
}

func storyEvents(events []wire.StoryEvent, now time.Time) string {
	var b strings.Builder
	b.WriteString("TIME\tAGO\tSOURCE\tEVENT\n")
	for _, one := range events {
		at, since := "-", "-"
		if one.Time != nil {
			at, since = moment(*one.Time), age(now.Sub(*one.Time))
		}
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\n", at, since, one.Source, one.Text)
	}
	return b.String()
}

// age returns how long ago something was, in its two largest units. The clocks of other
// machines may be ahead, so a negative time is shown as 0s.
func age(d time.Duration) string {
	const day = 24 * time.Hour
	d = max(0, d.Truncate(time.Second))
	switch {
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return d.String()
	}
}
