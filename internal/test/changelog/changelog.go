// Package changelog checks the changes that Bivouac reports of its sessions: none may be
// missing, none invented, none reported twice and none out of order.
//
// [Check] replays the changes of all chats and finds those that cannot follow each other.
// [Compare] compares the changes with what callers asked for and were told.
// [Difference] compares the changes that two readers got.
//
// The package knows changes only as callers see them. It must never import the code that
// makes them.
package changelog

import (
	"fmt"
	"slices"

	"github.com/google/uuid"
)

// Change is a reported change of a chat's session, or of a spare.
type Change struct {
	Index   uint64
	Type    string
	Chat    uuid.UUID // zero for a spare
	Session uuid.UUID
	Request string // ID of the request that caused it; empty if none did
}

func (c Change) String() string {
	return fmt.Sprintf("change %d: %s of chat %s session %s", c.Index, c.Type, c.Chat, c.Session)
}

// Standing is a chat's session as the changes tell.
type Standing struct {
	Session uuid.UUID
	State   string // creating, running, dead or lost; empty if the chat has no session
}

// history is what the changes of one chat have told so far.
type history struct {
	Standing
	created map[uuid.UUID]bool // sessions whose creation was told
	ready   map[uuid.UUID]bool // those whose sandbox was ready
}

// Check returns the sessions that remain after all changes, by chat, and what is wrong
// with the order of the changes. If a chat is edited, which means that somebody changed its
// record by hand or set the store back, Check only expects that no session begins twice in a
// row. After the store was set back, a chat can claim the same spare once more.
func Check(changes []Change, edited func(chat uuid.UUID) bool) (map[uuid.UUID]Standing, []string) {
	var problems []string
	chats := make(map[uuid.UUID]*history)
	for i, c := range changes {
		wrong := ""
		if c.Chat != uuid.Nil { // else it is of a spare
			wrong = historyOf(chats, c.Chat).accept(c, edited(c.Chat))
		}
		if i > 0 && wrong == "" {
			wrong = outOfOrder(changes[i-1], c)
		}
		if wrong != "" {
			problems = append(problems, fmt.Sprintf("%v: %s", c, wrong))
		}
	}
	standing := make(map[uuid.UUID]Standing)
	for chat, h := range chats {
		if h.State != "" {
			standing[chat] = h.Standing
		}
	}
	return standing, problems
}

func historyOf(chats map[uuid.UUID]*history, chat uuid.UUID) *history {
	if chats[chat] == nil {
		chats[chat] = &history{created: make(map[uuid.UUID]bool), ready: make(map[uuid.UUID]bool)}
	}
	return chats[chat]
}

// accept takes a change into account. It returns what is wrong with it, or "".
func (h *history) accept(c Change, edited bool) string {
	if edited && c.Type == "created" && h.Session != c.Session {
		delete(h.created, c.Session)
		delete(h.ready, c.Session)
	}
	wrong := h.twice(c)
	if illegal := h.apply(c); wrong == "" && !edited {
		wrong = illegal
	}
	return wrong
}

// outOfOrder returns why next must not follow previous, or "". Two changes of one
// transaction have the same index: the end of a session and the beginning of the one that
// takes over its record, a claim that failed and the start that takes its place, or a renewal and
// what it saw of the sandbox.
func outOfOrder(previous, next Change) string {
	switch {
	case next.Index > previous.Index:
		return ""
	case next.Index < previous.Index:
		return fmt.Sprintf("its index is below the one before, %d", previous.Index)
	case next == previous:
		return "it is reported twice"
	case previous.Chat == next.Chat && slices.Contains(together[next.Type], previous.Type):
		return ""
	default:
		return fmt.Sprintf("it has the index of another transaction: %v", previous)
	}
}

// twice returns why a session that begins must not, or "".
func (h *history) twice(c Change) string {
	switch {
	case c.Type == "created" && h.created[c.Session]:
		return "it was created before"
	case c.Type == "ready" && h.ready[c.Session]:
		return "it was ready before"
	case c.Type == "ready" && !h.created[c.Session]:
		return "it was never created"
	default:
		return ""
	}
}

// together are the types of changes after which another one may come in one transaction.
var together = map[string][]string{
	"created": {"replaced", "settled", "start_failed"}, // the last one of a spare that could not be claimed
	"adopted": {"replaced", "settled"},
	"renewed": {"running", "lost"},
}

// apply takes a change into account. It returns why the change cannot follow those before
// it, or "".
func (h *history) apply(c Change) (wrong string) {
	before := h.Standing
	switch c.Type {
	case "created":
		wrong = h.require(before.State == "")
		h.Standing = Standing{c.Session, "creating"}
		h.created[c.Session] = true
	case "ready":
		wrong = h.require(before == Standing{c.Session, "creating"})
		h.Standing = Standing{c.Session, "running"}
		h.ready[c.Session] = true
	case "adopted":
		wrong = h.require(before.State == "")
		h.Standing = Standing{c.Session, "running"}
	case "running", "lost", "dead":
		wrong = h.require(before.Session == c.Session && mayBecome(before.State, c.Type))
		h.Standing = Standing{c.Session, c.Type}
	case "renewed":
		wrong = h.require(before.Session == c.Session && (before.State == "running" || before.State == "lost"))
	case "start_failed":
		wrong = h.require(before == Standing{c.Session, "creating"})
		h.Standing = Standing{}
	case "settled", "deleted":
		wrong = h.require(before.Session == c.Session)
		h.Standing = Standing{}
	case "replaced", "expired":
		wrong = h.require(before.Session == c.Session && before.State != "creating")
		h.Standing = Standing{}
	case "repaired":
		wrong = "nobody repaired a record"
		h.Standing = Standing{}
	case "conflict": // it is stored after the create looked, when the session may have ended
		wrong = h.require(h.ready[c.Session])
	case "orphan_stopped":
		wrong = h.require(before.Session != c.Session)
	default:
		wrong = "there is no such type"
	}
	return wrong
}

// mayBecome reports whether the sandbox of a session may be seen to change like this.
func mayBecome(from, to string) bool {
	switch from {
	case "running":
		return to == "lost" || to == "dead"
	case "lost":
		return to == "running" || to == "dead"
	default:
		return false
	}
}

// require returns what the chat's changes have told so far, unless ok is true.
func (h *history) require(ok bool) string {
	switch {
	case ok:
		return ""
	case h.State == "":
		return "the chat has no session"
	default:
		return fmt.Sprintf("the chat has session %s, which is %s", h.Session, h.State)
	}
}

// Difference returns how the changes of two readers differ, or "".
func Difference(a, b []Change) string {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("as number %d one reader got %v, and another %v", i+1, a[i], b[i])
		}
	}
	switch {
	case len(a) > len(b):
		return fmt.Sprintf("one reader got %v, and another did not", a[len(b)])
	case len(b) > len(a):
		return fmt.Sprintf("one reader got %v, and another did not", b[len(a)])
	}
	return ""
}
