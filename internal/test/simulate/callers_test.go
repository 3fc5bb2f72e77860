package simulate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// call is a request and the answer that its caller got.
type call struct {
	request
	id      string // of the request
	caller  int
	began   time.Duration
	ended   time.Duration
	told    string // the result of create or delete, a state, or a kind of error
	session string // session ID in the answer
	token   string // access token of that session
	agentOf string // agent of that session
	expires time.Duration
	ahead   time.Duration // how far the replica's time was ahead when it answered
	skew    time.Duration // how far replicas may disagree on when the session expires
	warm    bool          // that session's sandbox was a spare
	open    bool          // its effect and whether it is over are unknown
	err     error
}

func (c call) String() string {
	s := fmt.Sprintf("%12v to %12v  caller %d: %v: %s", c.began, c.ended, c.caller, c.request, c.told)
	if c.session != "" {
		s += fmt.Sprintf(" %s (%s) until %v", c.session[:8], c.agentOf, c.expires)
	}
	if c.err != nil {
		s += fmt.Sprintf(": %v", c.err)
	}
	return s
}

// call makes the requests of one caller, one after the other.
func (w *world) call(caller int, requests []request) {
	for _, r := range requests {
		wait(w.ctx, r.after)
		at := w.replica(r.replica)
		if at.isDead() {
			at = w.replica(r.replica + 1)
		}
		if at.isDead() {
			continue
		}
		w.ask(caller, r, at)
	}
}

// scoped is a caller with a policy, which names the AI agents of this simulation by
// their prefix. Every second caller has it; the others may do everything.
var scoped = scheduler.Caller{Name: "scoped", Policies: []*scheduler.Policy{{
	Name:   "scoped",
	Agents: []scheduler.AgentRule{{Prefix: "agent-", Capabilities: scheduler.CapWrite}},
}}}

// ask sends a request to a replica and records the answer. If the replica dies,
// the caller gets no answer.
func (w *world) ask(caller int, r request, at *replica) {
	ctx, cancel := context.WithCancel(network.WithCaller(w.ctx, strconv.Itoa(caller)))
	defer cancel()
	if caller%2 == 0 {
		ctx = scheduler.WithCaller(ctx, scoped)
	}
	if r.patient > 0 {
		ctx, cancel = context.WithTimeout(ctx, r.patient)
		defer cancel()
	}
	c := call{request: r, caller: caller, began: w.now()}
	w.mu.Lock()
	w.requests[caller]++
	c.id = fmt.Sprintf("%d-%d", caller, w.requests[caller])
	ctx = scheduler.WithRequestID(ctx, c.id)
	w.asked.happens(max(0, slices.Index(w.replicas, at))) // 0 for a replica that was replaced
	w.mu.Unlock()
	w.note("caller %d asks %s: %v", caller, at.name, r)
	answered := make(chan call, 1)
	asked := c // carryOut may continue after the caller has given up
	w.remains.Go(func() {
		w.carryOut(ctx, &asked, at)
		asked.ended = w.now()
		answered <- asked
	})
	select {
	case c = <-answered:
		w.checkTold(c)
		w.checkWarm(c)
	case <-at.died:
		c.ended, c.told, c.open = w.now(), "nothing", true
	}
	w.note("caller %d is told: %s %s", caller, c.told, c.session)
	if c.err != nil { // if two limits pass at the same instant, the error may name either
		w.note(logged, fmt.Sprintf("caller %d is told: %v", caller, c.err))
	}
	w.mu.Lock()
	w.history = append(w.history, c)
	w.mu.Unlock()
}

func (w *world) carryOut(ctx context.Context, c *call, at *replica) {
	chatID := w.chatIDs[c.chat]
	var session scheduler.Session
	switch c.kind {
	case "create":
		var result scheduler.CreateResult
		result, c.err = at.scheduler.Create(ctx, scheduler.CreateCommand{
			ChatID: chatID, AgentID: c.agent, VolumeHostPath: "/volume", TTL: c.ttl, Progress: func(runtime.Stage) {},
		})
		c.told, session = string(result.Result), result.Session
		if conflict, ok := errors.AsType[*scheduler.ConflictError](c.err); ok {
			c.told, session, c.err = "conflict", conflict.Session, nil
		}
	case "renew":
		session, c.err = at.scheduler.Renew(ctx, chatID, c.ttl)
		c.told = "renewed"
	case "get":
		session, _, c.err = at.scheduler.Get(ctx, chatID, scheduler.Block{})
		c.told = string(session.State)
	case "delete":
		var result scheduler.DeleteResult
		result, c.err = at.scheduler.Delete(ctx, chatID)
		c.told = "not_found"
		if result.Found {
			c.told, session.SessionID = "deleted", result.SessionID
		}
	default:
		panic("no such request: " + c.kind)
	}
	// The time that the replicas agree on, as this replica knows it.
	now := at.clock.Now()
	c.ahead = time.Until(now)
	switch {
	case c.err != nil:
		c.told = scheduler.Kind(c.err)
		c.open = !isAnswer(c.told)
	case c.told != "not_found":
		c.session, c.agentOf, c.token, c.warm = session.SessionID.String(), session.AgentID, string(session.AccessToken), session.Warm
		c.expires = w.now() + session.ExpiresAt.Sub(now)
	}
}

// isAnswer reports whether an error of this kind tells the state of the chat.
func isAnswer(kind string) bool {
	switch kind {
	case "not_found", "expired", "not_running":
		return true
	default:
		return false
	}
}
