package simulate

import (
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// chatState is a possible state of a chat, as far as callers can tell.
type chatState struct {
	session string // session ID; unknown if a create may have made a session that nobody was told of
	agent   string
	until   time.Duration // when it expires; anytime if a renewal may have changed that
	ended   bool          // its sandbox may be gone, so the session may be replaced or vanish
	deleted string        // if there is no session: ID of the deleted one
}

const (
	unknown = "unknown"
	anytime = time.Duration(-1)
)

// skewLimit is how far replicas may disagree on when a session expires.
const skewLimit = 3 * time.Second

// skew returns how far replicas may disagree in this run. It is limited by how far the
// replicas' times were ahead when they answered, and by what can move the agreed time: a
// tick that arrives late, or at a replica that is paused, may set the time back, and if the
// clock's key is lost while no replica knows the time, the time continues from another
// machine's clock.
func (w *world) skew() time.Duration {
	var limit time.Duration
	if w.odds.Late > 0 {
		limit += network.MaxLate
	}
	for _, f := range w.faults {
		if f.kind == "pause" { // a paused replica reads a tick late
			limit += f.lasts
		}
	}
	if slices.ContainsFunc(w.faults, func(f fault) bool { return strings.HasPrefix(f.kind, "clock ") }) {
		limit += slices.Max(w.skews) - slices.Min(w.skews)
	}
	var all []time.Duration
	for _, c := range w.history {
		if !c.open { // an answer that there is no session may be the first after the time moved
			all = append(all, c.ahead)
		}
	}
	if len(all) == 0 {
		return skewLimit
	}
	return skewLimit + min(limit, slices.Max(all)-slices.Min(all))
}

// by returns the time by which every effect of a call is done.
func (c call) by() time.Duration {
	if c.open {
		return math.MaxInt64
	}
	return c.ended
}

// mayBeOver reports whether, by the end of the call, there may be no session or
// only one that is about to be replaced.
func (s chatState) mayBeOver(c call) bool {
	return s.session == "" || s.session == unknown || s.ended || s.until == anytime || s.until-c.skew <= c.by()
}

// mayStand reports whether the session may be valid at the beginning of the
// call.
func (s chatState) mayStand(c call) bool {
	return !s.ended && (s.until == anytime || c.began <= s.until+c.skew)
}

// isEnd is the end of a sandbox, at some time after its cause.
type isEnd struct{ session string }

// checkHistory returns the chats for which no order of requests and events
// explains the answers to callers.
func (w *world) checkHistory() []int {
	var bad []int
	for chat := range w.chats {
		if w.isEdited(w.chatIDs[chat].String()) {
			continue // answers after a manual change cannot be explained here
		}
		model := w.model()
		if porcupine.CheckOperationsTimeout(model, w.operations(chat), 20*time.Second) != porcupine.Ok {
			bad = append(bad, chat)
		}
	}
	return bad
}

// operations returns the requests about a chat and the events of its sessions. It leaves
// out what changes nothing: each operation without an end doubles what the checker may have
// to try.
func (w *world) operations(chat int) []porcupine.Operation {
	var ops []porcupine.Operation
	skew, told := w.skew(), map[string]bool{}
	for _, c := range w.history {
		if c.chat != chat || c.open && c.kind == "get" {
			continue
		}
		told[c.session] = true
		c.skew = skew
		ops = append(ops, porcupine.Operation{
			ClientId: c.caller, Input: c, Output: c, Call: int64(c.began), Return: int64(c.by()),
		})
	}
	for _, d := range w.deaths {
		if !told[d.sessionID] {
			continue
		}
		ops = append(ops, porcupine.Operation{
			ClientId: 1000 + len(ops), Input: isEnd{d.sessionID}, Call: int64(d.at), Return: math.MaxInt64,
		})
	}
	return ops
}

// model defines which answers callers may get, as the reference and the
// contract say.
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

// step returns the possible states of the chat after c. made means that the
// creator of the session in the answer was told of it, so it cannot be an
// unknown session.
func (s chatState) step(c call, made bool) []chatState {
	is := s.session == c.session || s.session == unknown && !made
	this := chatState{session: c.session, agent: c.agentOf, until: c.expires, ended: s.ended}
	if s.session == c.session && c.told != "renewed" && (s.until-c.expires).Abs() <= c.skew {
		this.until = s.until // as the caller that set it was told, not as another clock shows it
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
		case c.told == "stopping" && c.session == s.deleted: // by a delete that is still in progress
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
		case c.open: // if it has begun, another replica finishes it
			ended := s
			ended.ended = true
			return []chatState{s, {deleted: s.session}, ended}
		case c.told == "not_found":
			return s.ifOver(c, chatState{})
		case is, !made && s.mayBeOver(c): // even an intent, which nobody was told of
			return []chatState{{deleted: c.session}}
		case c.session == s.deleted: // two deletes at a time, one of which took over from the other
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
	default: // it failed, or its result is unknown
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
