package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/apiclient"
	"github.com/bivouac/bivouac/internal/httpapi/wire"
)

func sessionWatchCommand(t terminal) *command {
	var agentID string
	var asJSON *bool
	c := sessionCommandOf(t, "session watch", func(c *command) {
		c.flags.StringVar(&agentID, "agent-id", "", "Only sessions of the agent with this `ID`.")
		asJSON = jsonFlag(c)
	}, func(ctx context.Context, c *command, api *apiclient.Client, chat uuid.UUID) error {
		look := lookAtAll(api, agentID)
		if chat != uuid.Nil {
			look = lookAtOne(api, chat)
		}
		return watch(ctx, look, func(change change) error {
			if *asJSON {
				return json.NewEncoder(c.out).Encode(change) // a line each
			}
			_, err := fmt.Fprintln(c.out, change)
			return err
		})
	})
	c.args = "[CHAT_ID]"
	c.synopsis = "Show sessions as they change"
	c.about = `Shows the chat's session, or all sessions, and from then on a line for each
change, until Ctrl-C.`
	c.example = "$ bivouac session watch"
	return c
}

// change is a session that changed. Session is nil where it is gone.
type change struct {
	Time    time.Time     `json:"time"`
	ChatID  uuid.UUID     `json:"chat_id"`
	Session *wire.Session `json:"session"`
}

func (c change) String() string {
	words := []string{moment(c.Time), c.ChatID.String()}
	if c.Session == nil {
		words = append(words, "gone")
	} else {
		words = append(words, standing(*c.Session))
	}
	return strings.Join(words, "  ")
}

// standing is what a change of is told.
func standing(s wire.Session) string {
	words := []string{s.State, endpointOf(s), "expires " + moment(s.ExpiresAt)}
	if s.Reason != "" {
		words = append(words, s.Reason)
	}
	return strings.Join(words, "  ")
}

// look returns the sessions as they stand once they have changed since index,
// and the index for the next look. With index 0 it returns at once.
type look func(ctx context.Context, index uint64) ([]wire.Session, uint64, error)

func lookAtOne(api *apiclient.Client, chat uuid.UUID) look {
	return func(ctx context.Context, index uint64) ([]wire.Session, uint64, error) {
		session, next, err := api.Get(ctx, chat, apiclient.Block{Index: index})
		if e, ok := errors.AsType[*apiclient.Error](err); ok && e.Code == wire.CodeNotFound {
			return nil, next, nil
		}
		return []wire.Session{session}, next, err
	}
}

func lookAtAll(api *apiclient.Client, agentID string) look {
	return func(ctx context.Context, index uint64) ([]wire.Session, uint64, error) {
		in := apiclient.ListInput{AgentID: agentID, PerPage: 1000, Block: apiclient.Block{Index: index}}
		page, next, err := api.List(ctx, in)
		sessions := page.Sessions
		// What changes between two pages gives the next look an index that is
		// over, so it returns at once.
		for err == nil && page.NextToken != "" {
			in.NextToken, in.Block = page.NextToken, apiclient.Block{}
			page, _, err = api.List(ctx, in)
			sessions = append(sessions, page.Sessions...)
		}
		return sessions, next, err
	}
}

// watch tells each change until ctx ends. Where the agent says that waiting
// helps, it waits and goes on.
func watch(ctx context.Context, look look, tell func(change) error) error {
	var index uint64
	known := map[uuid.UUID]wire.Session{}
	for ctx.Err() == nil {
		sessions, next, err := look(ctx, index)
		e, refused := errors.AsType[*apiclient.Error](err)
		switch {
		case err == nil:
			index = next
			for _, change := range changes(known, sessions, time.Now()) {
				if err := tell(change); err != nil {
					return err
				}
			}
		case refused && e.RetryAfter > 0:
			select {
			case <-ctx.Done():
			case <-time.After(e.RetryAfter):
			}
		case ctx.Err() == nil:
			return err
		}
	}
	return nil
}

// changes brings known up to date and returns how it changed.
func changes(known map[uuid.UUID]wire.Session, sessions []wire.Session, now time.Time) []change {
	var changed []change
	gone := maps.Clone(known)
	for _, s := range sessions {
		old, ok := known[s.ChatID]
		if !ok || old.SessionID != s.SessionID || standing(old) != standing(s) {
			changed = append(changed, change{now, s.ChatID, &s})
		}
		known[s.ChatID] = s
		delete(gone, s.ChatID)
	}
	for _, chat := range slices.SortedFunc(maps.Keys(gone), func(a, b uuid.UUID) int { return strings.Compare(a.String(), b.String()) }) {
		delete(known, chat)
		changed = append(changed, change{now, chat, nil})
	}
	return changed
}
