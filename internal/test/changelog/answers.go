package changelog

import (
	"fmt"

	"github.com/google/uuid"
)

// Request is what a caller asked for, and what it was told.
type Request struct {
	ID   string
	Kind string // create, renew, delete or cleanup
	Chat uuid.UUID
	// Told is the answer: created, replaced, renewed, deleted or expired. Any other answer
	// says of no change.
	Told    string
	Session uuid.UUID // the session in the answer
}

func (r Request) String() string {
	return fmt.Sprintf("%s of chat %s, request %s, answered %s session %s", r.Kind, r.Chat, r.ID, r.Told, r.Session)
}

// cause is the kind of request without which a change cannot happen. Changes of other
// types also happen without a request.
var cause = map[string]string{
	"created": "create", "ready": "create", "start_failed": "create", "replaced": "create", "conflict": "create",
	"renewed": "renew", "deleted": "delete",
}

// expected are the changes of which an answer tells, each of the session in the answer and
// caused by the request.
var expected = map[string][]string{
	"created":  {"created", "ready"},
	"replaced": {"created", "ready"},
	"renewed":  {"renewed"},
}

// isEnd reports whether a session ends with a change, and no other takes over its record.
// An answer deleted or expired tells of one of them. It may be caused by another request
// that finished what the first one began.
func isEnd(what string) bool { return what == "deleted" || what == "expired" || what == "settled" }

// Compare returns which answers lack their changes, and which changes nobody asked for. It
// leaves out chats that are edited, as [Check] says.
func Compare(changes []Change, requests []Request, edited func(chat uuid.UUID) bool) []string {
	asked := make(map[string]Request)
	for _, r := range requests {
		asked[r.ID] = r
	}
	type effect struct {
		what, request string
		session       uuid.UUID
	}
	effects := make(map[effect]int)
	replaced := make(map[string]int) // sessions that gave way, by request
	ended := make(map[uuid.UUID]int) // ends, by session
	var problems []string
	for _, c := range changes {
		effects[effect{c.Type, c.Request, c.Session}]++
		switch {
		case c.Type == "replaced":
			replaced[c.Request]++
		case isEnd(c.Type):
			ended[c.Session]++
		}
		r, known := asked[c.Request]
		if kind := cause[c.Type]; kind != "" && (!known || r.Kind != kind || r.Chat != c.Chat) && !edited(c.Chat) {
			problems = append(problems, fmt.Sprintf("%v: request %q asked for no %s of this chat", c, c.Request, kind))
		}
	}
	for _, r := range requests {
		if edited(r.Chat) {
			continue
		}
		for _, what := range expected[r.Told] {
			if n := effects[effect{what, r.ID, r.Session}]; n != 1 {
				problems = append(problems, fmt.Sprintf("%v: there are %d changes %q", r, n, what))
			}
		}
		if n := ended[r.Session]; n != 1 && isEnd(r.Told) {
			problems = append(problems, fmt.Sprintf("%v: the session ends %d times", r, n))
		}
		if n := replaced[r.ID]; n != 0 && r.Told == "created" || n != 1 && r.Told == "replaced" {
			problems = append(problems, fmt.Sprintf("%v: there are %d changes \"replaced\"", r, n))
		}
	}
	return problems
}
