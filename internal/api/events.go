package api

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

// events sends what happens to sessions, one line for each transaction.
func (a *API) events(w http.ResponseWriter, r *http.Request, q query) error {
	query, err := q.events()
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		query.Follow = false
	}
	auditAgent(w, query.AgentID)
	if caller := scheduler.CallerFrom(r.Context()); caller.Method != "" { // else nobody can be told from another
		leave, err := a.shares.Enter(caller.Key())
		if err != nil {
			return err
		}
		defer leave()
	}

	lines := json.NewEncoder(w)
	lines.SetEscapeHTML(false)
	hasBegun := false
	for batch, err := range a.config.Sessions.Events(r.Context(), query) {
		switch {
		case err == nil:
		case !hasBegun && a.stopping.Err() != nil:
			return errShuttingDown
		case !hasBegun:
			return err
		case r.Context().Err() != nil: // the caller has gone, or the server stops
			return nil
		default:
			e := errorFor(err, a.config.Store)
			last := e.wire()
			last.RequestID = w.Header().Get(wire.HeaderRequestID)
			_ = lines.Encode(wire.EventBatch{Error: &last}) // fails only if the caller has gone
			return nil
		}
		if !hasBegun {
			hasBegun = true
			setIndex(w, batch.Index)
			w.Header().Set("Content-Type", wire.TypeFrames)
		}
		if err := lines.Encode(wireBatch(batch)); err != nil {
			return nil // the caller has gone, or reads too slowly
		}
	}
	return nil
}

// events returns what the query selects.
func (q query) events() (scheduler.EventQuery, error) {
	out := scheduler.EventQuery{AgentID: q["agent_id"]}
	if s, ok := q["index"]; ok {
		index, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return out, invalid("index is not a number")
		}
		out.After = &index
	}
	if s, ok := q["chat_id"]; ok {
		var err error
		if out.ChatID, err = parseChatID(s); err != nil {
			return out, err
		}
	}
	if s, ok := q["type"]; ok {
		for name := range strings.SplitSeq(s, ",") {
			out.Types = append(out.Types, scheduler.ChangeType(name))
		}
	}
	var err error
	out.Follow, err = q.follow(true)
	return out, err
}

func wireBatch(batch scheduler.EventBatch) wire.EventBatch {
	if len(batch.Changes) == 0 {
		return wire.EventBatch{}
	}
	out := wire.EventBatch{Index: batch.Index, Events: make([]wire.Event, len(batch.Changes))}
	for i, c := range batch.Changes {
		topic, key := wire.TopicSession, c.ChatID.String()
		if c.Pool != "" {
			topic, key = wire.TopicPool, c.Pool
		}
		out.Events[i] = wire.Event{
			Topic: topic, Type: string(c.Type), Key: key, Index: c.Index,
			Payload: wire.EventPayload{
				Time: c.Time.UTC(), ChatID: c.ChatID, SessionID: c.SessionID, AgentID: c.AgentID, Runtime: c.Runtime,
				Reason: c.Reason, Caller: c.Caller, RequestID: c.RequestID,
			},
		}
	}
	return out
}
