//go:build faults

package simulate

import (
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// chatState is what a chat may be like, as far as callers can tell.
type chatState struct {
	session string // ID; unknown where a create may have made one that nobody was told of
	agent   string
	ended   bool   // its sandbox may be gone, or its time over: it may be replaced or vanish
	deleted string // where there is no session: ID of the one that was deleted
}

const unknown = "unknown"

// mayBeOver says whether there may be no session any more, or one that is to be
// replaced.
func (s chatState) mayBeOver() bool { return s.session == "" || s.ended || s.session == unknown }

// isEnd is an event that ends a session, at some time after it happened: the
// sandbox died, or its time is over.
type isEnd struct{ session string }

// skewLimit is how far replicas may be apart in when a session expires.
const skewLimit = 3 * time.Second

// checkHistory returns the chats for which no order of all that was asked and
// happened explains what callers were told.
func (w *world) checkHistory() []int {
	var bad []int
	for chat := range w.chats {
		model := w.model()
		if porcupine.CheckOperationsTimeout(model, w.operations(chat), 20*time.Second) != porcupine.Ok {
			bad = append(bad, chat)
		}
	}
	return bad
}

// operations are what was asked about a chat and what happened to its sessions.
func (w *world) operations(chat int) []porcupine.Operation {
	var ops []porcupine.Operation
	until := make(map[string]time.Duration)
	for _, c := range w.history {
		if c.chat != chat {
			continue
		}
		op := porcupine.Operation{ClientId: c.caller, Input: c, Output: c, Call: int64(c.began), Return: int64(c.ended)}
		if c.open {
			op.Return = math.MaxInt64
		}
		ops = append(ops, op)
		if c.session != "" && c.told != "deleted" {
			until[c.session] = max(until[c.session], c.expires)
		}
	}
	end := func(session string, at time.Duration) {
		ops = append(ops, porcupine.Operation{
			ClientId: 1000 + len(ops), Input: isEnd{session}, Call: int64(at), Return: math.MaxInt64,
		})
	}
	for session, expires := range until {
		end(session, max(0, expires-skewLimit))
	}
	for _, d := range w.deaths {
		end(d.sessionID, d.at)
	}
	return ops
}

// model says what callers may be told, as reference and contract have it.
func (w *world) model() porcupine.Model {
	var made []string // sessions whose creator was told of them
	for _, c := range w.history {
		if c.told == "created" || c.told == "replaced" {
			made = append(made, c.session)
		}
	}
	nondeterministic := porcupine.NondeterministicModel{
		Init: func() []any { return []any{chatState{}} },
		Step: func(state, input, _ any) []any {
			s := state.(chatState)
			var next []chatState
			switch in := input.(type) {
			case isEnd:
				next = s.end(in.session)
			case call:
				next = s.step(in, slices.Contains(made, in.session))
			}
			all := make([]any, len(next))
			for i, n := range next {
				all[i] = n
			}
			return all
		},
	}
	return nondeterministic.ToModel()
}

func (s chatState) end(session string) []chatState {
	if s.session == session {
		s.ended = true
	}
	return []chatState{s}
}

// step returns what the chat may be like after c. made says that the creator of
// the session in the answer was told of it: then it is no unknown one.
func (s chatState) step(c call, made bool) []chatState {
	is := s.session == c.session || s.session == unknown && !made
	this := chatState{session: c.session, agent: c.agentOf, ended: s.ended}
	switch c.kind {
	case "create":
		return s.create(c, is, this)
	case "get":
		switch {
		case c.open || c.told == "creating":
			return []chatState{s}
		case c.told == "not_found":
			return s.ifOver(chatState{})
		case is:
			return []chatState{this}
		}
	case "renew":
		switch {
		case c.open:
			return []chatState{s}
		case c.told == "renewed" && is && !s.ended:
			return []chatState{this}
		case c.told == "not_found":
			return s.ifOver(chatState{})
		case c.told == "expired", c.told == "not_running":
			return s.ifOver(s)
		}
	case "delete":
		switch {
		case c.open: // begun, it is finished by somebody else
			return []chatState{s, {deleted: s.session}, {session: s.session, agent: s.agent, ended: true}}
		case c.told == "not_found":
			return s.ifOver(chatState{})
		case is, !made && s.mayBeOver(): // also an intent, which nobody was told of
			return []chatState{{deleted: c.session}}
		case c.session == s.deleted: // by two at a time, one of which took over from the other
			return []chatState{s}
		}
	}
	return nil
}

func (s chatState) create(c call, is bool, this chatState) []chatState {
	switch c.told {
	case "created":
		return s.ifOver(chatState{session: c.session, agent: c.agent})
	case "replaced":
		if s.session != "" {
			return s.ifOver(chatState{session: c.session, agent: c.agent})
		}
	case "reused":
		if is && !s.ended && (s.agent == c.agent || s.session == unknown) {
			return []chatState{this}
		}
	case "conflict":
		if is && !s.ended && c.agentOf != c.agent {
			return []chatState{this}
		}
	default: // it failed, or it is not known what became of it
		if s.mayBeOver() {
			return []chatState{s, {}, {session: unknown, agent: c.agent}}
		}
		return []chatState{s}
	}
	return nil
}

func (s chatState) ifOver(next chatState) []chatState {
	if s.mayBeOver() {
		return []chatState{next}
	}
	return nil
}
