package simulate

import (
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// chatState is what a chat may be like, as far as callers can tell.
type chatState struct {
	session string // ID; unknown where a create may have made one that nobody was told of
	agent   string
	until   time.Duration // when it expires; anytime where a renewal may have changed that
	ended   bool          // its sandbox may be gone: it may be replaced or vanish
	deleted string        // where there is no session: ID of the one that was deleted
}

const (
	unknown = "unknown"
	anytime = time.Duration(-1)
)

// skewLimit is how far replicas may be apart in when a session expires.
const skewLimit = 3 * time.Second

// skew is how far they may be apart in this run: as far as callers were told, and
// no further than what can move the agreed time. A tick that comes late may take it
// back. If its key is lost while no replica knows the time, the time goes on as
// another machine has it.
func (w *world) skew() time.Duration {
	var limit time.Duration
	if w.odds.Late > 0 {
		limit += network.MaxLate
	}
	if slices.ContainsFunc(w.faults, func(f fault) bool { return strings.HasPrefix(f.kind, "clock ") }) {
		limit += slices.Max(w.skews) - slices.Min(w.skews)
	}
	var all []time.Duration
	for _, c := range w.history {
		if c.session != "" {
			all = append(all, c.ahead)
		}
	}
	if len(all) == 0 {
		return skewLimit
	}
	return skewLimit + min(limit, slices.Max(all)-slices.Min(all))
}

// by is when all that a call does is done.
func (c call) by() time.Duration {
	if c.open {
		return math.MaxInt64
	}
	return c.ended
}

// mayBeOver says whether, by the end of a call, there may be no session any
// more, or one that is to be replaced.
func (s chatState) mayBeOver(c call) bool {
	return s.session == "" || s.session == unknown || s.ended || s.until == anytime || s.until-c.skew <= c.by()
}

// mayStand says whether, at the beginning of a call, the session may be valid.
func (s chatState) mayStand(c call) bool {
	return !s.ended && (s.until == anytime || c.began <= s.until+c.skew)
}

// isEnd is the end of a sandbox, at some time after what caused it.
type isEnd struct{ session string }

// checkHistory returns the chats for which no order of all that was asked and
// happened explains what callers were told.
func (w *world) checkHistory() []int {
	var bad []int
	for chat := range w.chats {
		if w.isEdited(w.chatIDs[chat].String()) {
			continue // only who made the change can explain what callers were told
		}
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
	skew := w.skew()
	for _, c := range w.history {
		if c.chat != chat {
			continue
		}
		c.skew = skew
		ops = append(ops, porcupine.Operation{
			ClientId: c.caller, Input: c, Output: c, Call: int64(c.began), Return: int64(c.by()),
		})
	}
	for _, d := range w.deaths {
		ops = append(ops, porcupine.Operation{
			ClientId: 1000 + len(ops), Input: isEnd{d.sessionID}, Call: int64(d.at), Return: math.MaxInt64,
		})
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
	this := chatState{session: c.session, agent: c.agentOf, until: c.expires, ended: s.ended}
	if s.session == c.session && c.told != "renewed" && (s.until-c.expires).Abs() <= c.skew {
		this.until = s.until // as whoever set it was told, and not as another clock shows it
	}
	switch c.kind {
	case "create":
		return s.create(c, is, this)
	case "get":
		switch {
		case c.open || c.told == "creating":
			return []chatState{s}
		case c.told == "not_found":
			return s.ifOver(c, chatState{})
		case is:
			return []chatState{this}
		case c.told == "stopping" && c.session == s.deleted: // by a delete that is still under way
			return []chatState{s}
		}
	case "renew":
		switch {
		case c.open: // it may have been renewed
			renewed := s
			renewed.until = anytime
			return []chatState{s, renewed}
		case c.told == "renewed" && is && s.mayStand(c):
			return []chatState{this}
		case c.told == "not_found":
			return s.ifOver(c, chatState{})
		case c.told == "expired", c.told == "not_running":
			return s.ifOver(c, s)
		}
	case "delete":
		switch {
		case c.open: // begun, it is finished by somebody else
			ended := s
			ended.ended = true
			return []chatState{s, {deleted: s.session}, ended}
		case c.told == "not_found":
			return s.ifOver(c, chatState{})
		case is, !made && s.mayBeOver(c): // also an intent, which nobody was told of
			return []chatState{{deleted: c.session}}
		case c.session == s.deleted: // by two at a time, one of which took over from the other
			return []chatState{s}
		}
	}
	return nil
}

func (s chatState) create(c call, is bool, this chatState) []chatState {
	made := chatState{session: c.session, agent: c.agent, until: c.expires}
	switch c.told {
	case "created":
		return s.ifOver(c, made)
	case "replaced":
		if s.session != "" {
			return s.ifOver(c, made)
		}
	case "reused":
		if is && s.mayStand(c) && (s.agent == c.agent || s.session == unknown) {
			return []chatState{this}
		}
	case "conflict":
		if is && s.mayStand(c) && c.agentOf != c.agent {
			return []chatState{this}
		}
	default: // it failed, or it is not known what became of it
		if s.mayBeOver(c) {
			return []chatState{s, {}, {session: unknown, agent: c.agent, until: anytime}}
		}
		return []chatState{s}
	}
	return nil
}

func (s chatState) ifOver(c call, next chatState) []chatState {
	if s.mayBeOver(c) {
		return []chatState{next}
	}
	return nil
}
