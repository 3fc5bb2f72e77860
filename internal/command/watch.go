package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/backoff"
)

func sessionWatchCommand(t terminal) *command {
	c := newCommand(t, "session watch")
	c.args = "[CHAT_ID]"
	c.synopsis = "Show sessions as they change"
	c.about = `Shows the chat's session, or all sessions, and then one line for each change. It
ends on Ctrl-C or, for one chat, when the chat's session is gone. If the server
goes away, it says so and continues when a server answers again.`
	c.example = "$ bivouac session watch"
	agentID := c.flags.String("agent-id", "", "Only sessions of the AI agent with this `ID`.")
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		w := watcher{look: lookAtAll(api, *agentID), tell: func(change change) error {
			if c.asJSON {
				return json.NewEncoder(c.out).Encode(change) // one line per change
			}
			_, err := fmt.Fprintln(c.out, printable(change.String()))
			return err
		}, retrying: c.tellRetry}
		if chat != uuid.Nil {
			w.look, w.untilGone = lookAtOne(api, chat), true
		}
		return w.watch(ctx)
	})
	return c
}

// tellRetry says that a failed read is repeated after pause.
func (c *command) tellRetry(err error, pause time.Duration) {
	if c.asJSON {
		c.tellJSON(err)
		return
	}
	c.tell("Error: %v\nTrying again in %s.", err, pause)
}

// change is a session that changed. Session is nil if the session is gone.
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

// standing returns a session's state as the watch command prints it.
func standing(s wire.Session) string {
	words := []string{s.State, endpointOf(s), "expires " + moment(s.ExpiresAt)}
	if s.Reason != "" {
		words = append(words, s.Reason)
	}
	return strings.Join(words, "  ")
}

// look returns the current sessions once they have changed since index, and the index
// for the next call. With index 0 it returns at once.
type look func(ctx context.Context, index uint64) ([]wire.Session, uint64, error)

func lookAtOne(api *apiclient.Client, chat uuid.UUID) look {
	return func(ctx context.Context, index uint64) ([]wire.Session, uint64, error) {
		answer, next, err := api.Get(ctx, chat, apiclient.Block{Index: index})
		if e, ok := errors.AsType[*apiclient.Error](err); ok && e.Code == wire.CodeNotFound {
			return nil, next, nil
		}
		return []wire.Session{answer.Session}, next, err
	}
}

func lookAtAll(api *apiclient.Client, agentID string) look {
	return func(ctx context.Context, index uint64) ([]wire.Session, uint64, error) {
		in := apiclient.ListInput{AgentID: agentID, PerPage: 1000, Block: apiclient.Block{Index: index}}
		page, next, err := api.List(ctx, in)
		sessions := page.Sessions
		// If something changes between two pages, the index of the first page is
		// outdated. The next look then returns at once.
		for err == nil && page.NextToken != "" {
			in.NextToken, in.Block = page.NextToken, apiclient.Block{}
			page, _, err = api.List(ctx, in)
			sessions = append(sessions, page.Sessions...)
		}
		return sessions, next, err
	}
}

// The shortest and the longest pause before a failed read is repeated.
const (
	firstRetry   = time.Second
	longestRetry = 15 * time.Second
)

// watcher reports how sessions change.
type watcher struct {
	look      look
	tell      func(change) error
	untilGone bool // end once all sessions are gone
	// retrying is called with the error of a failed read that is repeated after pause.
	retrying func(err error, pause time.Duration)
}

// watch reports each change until ctx ends. It repeats a failed read if that may help.
func (w watcher) watch(ctx context.Context) error {
	pauses := backoff.Backoff{Min: firstRetry, Max: longestRetry}
	var index uint64
	known := map[uuid.UUID]wire.Session{}
	connected := false
	for ctx.Err() == nil {
		sessions, next, err := w.look(ctx, index)
		if err == nil {
			changed := changes(known, sessions, time.Now())
			for _, change := range changed {
				if err := w.tell(change); err != nil {
					return err
				}
			}
			if w.untilGone && len(changed) > 0 && len(known) == 0 {
				return nil
			}
			index, connected = next, true
			pauses.Reset()
			continue
		}
		if ctx.Err() != nil {
			break
		}
		pause := retryPause(err, connected, &pauses)
		if pause == 0 {
			return err
		}
		w.retrying(err, pause)
		index = 0                     // another server may answer then, so start over
		_ = backoff.Sleep(ctx, pause) // the loop checks ctx
	}
	return nil //nolint:nilerr // to be interrupted is no failure
}

// retryPause returns the pause after which to repeat a failed read: that for which the
// server asks, or the next of pauses if an earlier read succeeded and the error may be
// temporary. It returns 0 if the read is not to be repeated.
func retryPause(err error, connected bool, pauses *backoff.Backoff) time.Duration {
	if pause := retryAfter(err); pause > 0 {
		return pause
	}
	if connected && mayPass(err) {
		return pauses.Next().Round(time.Millisecond)
	}
	return 0
}

// retryAfter returns how long the server asks to wait, 0 if it does not.
func retryAfter(err error) time.Duration {
	if e, ok := errors.AsType[*apiclient.Error](err); ok {
		return e.RetryAfter
	}
	return 0
}

// mayPass reports whether a read failed for a reason that may be temporary: no server
// can be reached, or the server or a proxy in front of it has a problem.
func mayPass(err error) bool {
	if e, ok := errors.AsType[*apiclient.Error](err); ok {
		return e.Status >= http.StatusInternalServerError
	}
	return errors.Is(err, apiclient.ErrUnreachable)
}

// changes updates known and returns what changed.
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
