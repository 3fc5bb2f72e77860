package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/runtime"
)

// The limits of Why.
const (
	maxStories     = 10               // sessions in an answer
	maxExplained   = 3                // of them, those that the runtime is asked about
	maxStoryEvents = 200              // events of one session
	explainLimit   = 10 * time.Second // to ask the runtimes
	maxWhy         = 16               // at a time, because each makes a few requests to the runtime
	maxTextBytes   = 4096             // of one event
)

// Story is what became of one session of a chat.
type Story struct {
	SessionID uuid.UUID
	AgentID   string
	Runtime   string
	State     State  // empty if the session has no record any more
	Outcome   string // what became of it, in one sentence
	Events    []StoryEvent
}

// StoryEvent is one thing that happened to a session.
type StoryEvent struct {
	Time   time.Time // zero if it is not known
	Source string    // who says so: SourceBivouac, or the name of a runtime
	Text   string    // one line for a person to read, at most 4096 bytes, without control characters
}

// SourceBivouac is the source of what Bivouac itself did.
const SourceBivouac = "bivouac"

// Why tells what became of the chat's last sessions, the newest first: what Bivouac did, as
// far as the store still keeps it, and what the runtime knows about the newest of them.
// It leaves out the sessions that the caller may not see, and returns ErrNotFound if
// nothing is left.
func (s *Scheduler) Why(ctx context.Context, chatID uuid.UUID) ([]Story, error) {
	leave, err := s.explaining.Enter()
	if err != nil {
		return nil, fmt.Errorf("why: %w", err)
	}
	defer leave()
	stories, current, err := s.stories(ctx, chatID)
	if err != nil {
		return nil, fmt.Errorf("why: %w", err)
	}
	if len(stories) == 0 {
		return nil, fmt.Errorf("why: %w: nothing is known of chat %s", ErrNotFound, chatID)
	}
	limited, cancel := context.WithTimeout(ctx, explainLimit)
	defer cancel()
	var g errgroup.Group
	for i := range stories[:min(len(stories), maxExplained)] {
		g.Go(func() error {
			stories[i].Events = append(stories[i].Events, s.explain(limited, stories[i])...)
			return nil
		})
	}
	_ = g.Wait() // its functions return no error
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("why: %w", err)
	}
	for i := range stories {
		var token runtime.Secret
		if current != nil && current.SessionID == stories[i].SessionID {
			token = current.AccessToken
		}
		stories[i].finish(token)
	}
	return stories, nil
}

// stories returns what Bivouac itself knows of the chat's sessions, the newest first, and
// the chat's session if there is one. It leaves out what the caller may not see.
func (s *Scheduler) stories(ctx context.Context, chatID uuid.UUID) ([]Story, *Session, error) {
	if err := checkChatID(chatID); err != nil {
		return nil, nil, err
	}
	changes, err := s.History(ctx, chatID)
	if err != nil {
		return nil, nil, err
	}
	current, _, err := s.Store.Get(ctx, chatID, Block{})
	if err != nil {
		return nil, nil, err
	}
	bySession := make(map[uuid.UUID]*Story)
	var all []*Story // in the order in which they began
	story := func(id uuid.UUID, agentID, runtimeName string) *Story {
		if bySession[id] == nil {
			bySession[id] = &Story{SessionID: id, AgentID: agentID, Runtime: runtimeName}
			all = append(all, bySession[id])
		}
		return bySession[id]
	}
	for _, change := range changes {
		if change.SessionID == uuid.Nil { // it is about a record that could not be read
			continue
		}
		told := story(change.SessionID, change.AgentID, change.Runtime)
		told.Events = append(told.Events, StoryEvent{change.Time, SourceBivouac, describe(change)})
		if change.Type.ends() {
			told.Outcome = sentence(describe(change))
		}
	}
	if current != nil {
		seen := s.observe(ctx, *current)
		told := story(seen.SessionID, seen.AgentID, seen.Runtime)
		if len(told.Events) == 0 {
			told.Events = []StoryEvent{{seen.CreatedAt, SourceBivouac, "created by " + seen.Owner}}
		}
		told.State, told.Outcome = seen.State, sentence(s.describeState(seen))
	}
	var visible []Story
	caller := CallerFrom(ctx)
	for _, told := range slices.Backward(all) {
		if caller.May(CapRead, told.AgentID) && len(visible) < maxStories {
			told.Outcome = cmp.Or(told.Outcome, "It has no record any more, and what ended it is no longer known.")
			visible = append(visible, *told)
		}
	}
	return visible, current, nil
}

// explain returns what the session's runtime tells about it.
func (s *Scheduler) explain(ctx context.Context, told Story) []StoryEvent {
	explainer, ok := s.Drivers[told.Runtime].(runtime.Explainer)
	if !ok {
		return nil
	}
	happened, err := explainer.Explain(ctx, told.SessionID.String())
	switch {
	case errors.Is(err, runtime.ErrNotFound), errors.Is(err, errors.ErrUnsupported):
		return nil
	case err != nil:
		s.Logger.Debug("explain_failed", "session_id", told.SessionID, "runtime", told.Runtime, "error", Kind(err), "detail", err)
		return []StoryEvent{{Source: told.Runtime, Text: "the runtime cannot tell now what happened: " + Kind(err)}}
	}
	events := make([]StoryEvent, len(happened))
	for i, one := range happened {
		events[i] = StoryEvent{one.Time, told.Runtime, one.Text}
	}
	return events
}

// finish sorts the story's events by time, those without a time last, and makes all text
// fit to be shown.
func (t *Story) finish(token runtime.Secret) {
	slices.SortStableFunc(t.Events, func(a, b StoryEvent) int {
		if a.Time.IsZero() != b.Time.IsZero() {
			return -a.Time.Compare(b.Time)
		}
		return a.Time.Compare(b.Time)
	})
	t.Events = t.Events[max(0, len(t.Events)-maxStoryEvents):]
	for i, one := range t.Events {
		t.Events[i].Text = oneLine(token.HideIn(one.Text))
	}
	t.Outcome = oneLine(token.HideIn(t.Outcome))
}

// ends reports whether a session has no record any more after such a change.
func (c ChangeType) ends() bool {
	switch c {
	case ChangeStartFailed, ChangeReplaced, ChangeExpired, ChangeDeleted, ChangeSettled, ChangeOrphanStopped, ChangeRepaired:
		return true
	case ChangeCreated, ChangeReady, ChangeRenewed, ChangeConflict, ChangeRunning, ChangeDead, ChangeLost, ChangeAdopted,
		ChangeSpareReady, ChangeSpareFailed, ChangeSpareEnded: // the last three are of no session
	}
	return false
}

// describe returns what happened, without its time.
func describe(c Change) string {
	because := func(text, joint string) string { return because(text, joint, c.Reason) }
	switch c.Type {
	case ChangeCreated:
		return because("created by "+c.Caller, ", from ")
	case ChangeReady:
		return "its sandbox is ready"
	case ChangeStartFailed:
		return "start failed and was undone: " + strings.TrimPrefix(c.Reason, "start the sandbox: ")
	case ChangeRenewed:
		return "renewed by " + c.Caller
	case ChangeConflict:
		return because("a create by "+c.Caller+" got a conflict", ", because these differ: ")
	case ChangeRunning:
		return "its sandbox is back"
	case ChangeDead:
		return because("its sandbox ended", ": ")
	case ChangeLost:
		return because("its sandbox cannot be reached", ": ")
	case ChangeReplaced:
		return because("stopped and replaced by a create of "+c.Caller, ", because: ")
	case ChangeExpired:
		return because("expired and cleaned up by "+c.Caller, "; before that: ")
	case ChangeDeleted:
		return because("deleted by "+c.Caller, "; before that: ")
	case ChangeSettled:
		return because("ended, because a replica had left its start or its stop unfinished", ": ")
	case ChangeAdopted:
		return because("its record was written again", ", because ")
	case ChangeOrphanStopped:
		return because("stopped as an orphan", ", because ")
	case ChangeRepaired:
		return because("repaired by "+c.Caller, ": ")
	case ChangeSpareReady, ChangeSpareFailed, ChangeSpareEnded: // of no session
	}
	return because(string(c.Type), ": ")
}

// describeState returns how a recorded session is now.
func (s *Scheduler) describeState(session Session) string {
	moment := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch session.State {
	case StateCreating:
		return "its start is in progress since " + moment(session.CreatedAt)
	case StateStopping:
		return because("its stop is in progress", ": ", session.Reason)
	case StateDead:
		return because("its sandbox ended", ": ", session.Reason)
	case StateLost:
		return because("its sandbox cannot be reached", ": ", session.Reason)
	case StateRunning:
	}
	if session.Expired(s.Now()) {
		return "it still runs, but expired at " + moment(session.ExpiresAt) + " and is about to be cleaned up"
	}
	return "it runs, and expires at " + moment(session.ExpiresAt)
}

// because returns text with a reason after it, if there is one.
func because(text, joint, reason string) string {
	if reason == "" {
		return text
	}
	return text + joint + reason
}

// sentence makes text a sentence.
func sentence(text string) string {
	first, size := utf8.DecodeRuneInString(text)
	return string(unicode.ToUpper(first)) + strings.TrimRight(text[size:], ".") + "."
}
