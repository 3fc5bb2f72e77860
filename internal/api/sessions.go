package api

import (
	"context"
	"errors"
	"net/http"
	"strconv"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func (a *API) create(w http.ResponseWriter, r *http.Request, _ query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	fields, objects, err := readObject(r, []string{"agent_id", "volume_host_path", "runtime", "ttl"}, []string{"labels"})
	if err != nil {
		return err
	}
	cmd := scheduler.CreateCommand{
		ChatID: chat, AgentID: fields["agent_id"], VolumeHostPath: fields["volume_host_path"], Runtime: fields["runtime"],
		Labels: objects["labels"],
	}
	if _, named := fields["runtime"]; named && cmd.Runtime == "" {
		return invalid("runtime is empty")
	}
	if cmd.TTL, err = ttl(fields); err != nil {
		return err
	}

	end := func() {}
	if wantsStages(r) {
		cmd.Progress, end = tellStages(w)
	}
	defer end() // after this returns or panics, no other goroutine may write to w
	res, err := a.config.Sessions.Create(r.Context(), cmd)
	end()
	if err != nil {
		return err
	}
	status := http.StatusCreated
	if res.Result == scheduler.ResultReused {
		status = http.StatusOK
	}
	return writeJSON(w, status, wire.CreateAnswer{
		Result: string(res.Result), Session: wireSession(res.Session), AccessToken: string(res.Session.AccessToken),
	})
}

func (a *API) get(w http.ResponseWriter, r *http.Request, q query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	block, err := q.block()
	if err != nil {
		return err
	}
	var session scheduler.Session
	var index uint64
	err = a.read(r, block, func(ctx context.Context) (err error) {
		session, index, err = a.config.Sessions.Get(ctx, chat, block)
		return err
	})
	if err == nil || errors.Is(err, scheduler.ErrNotFound) {
		setIndex(w, index)
	}
	if err != nil {
		return err
	}
	auditSession(w, session)
	return writeJSON(w, http.StatusOK, wire.GetAnswer{
		Session: wireSession(session), AccessToken: string(session.AccessToken),
		Capabilities: capabilities(scheduler.CallerFrom(r.Context()), session.AgentID),
	})
}

// capabilities returns the names of what the caller may do with the sessions of an AI
// agent.
func capabilities(caller scheduler.Caller, agentID string) []string {
	names := []string{}
	for _, capability := range scheduler.EachCapability() {
		if caller.May(capability, agentID) {
			names = append(names, capability.String())
		}
	}
	return names
}

func (a *API) list(w http.ResponseWriter, r *http.Request, q query) error {
	perPage, err := q.perPage()
	if err != nil {
		return err
	}
	block, err := q.block()
	if err != nil {
		return err
	}
	include, err := q.filter()
	if err != nil {
		return err
	}
	if include != nil {
		leave, err := a.scans.Enter()
		if err != nil {
			return err
		}
		defer leave()
	}
	auditAgent(w, q["agent_id"])
	var page scheduler.Page
	err = a.read(r, block, func(ctx context.Context) (err error) {
		page, err = a.config.Sessions.List(ctx, scheduler.Query{
			AgentID: q["agent_id"], PerPage: perPage, NextToken: q["next_token"], Block: block, Include: include,
		})
		return err
	})
	if err != nil {
		return err
	}
	setIndex(w, page.Index)
	return writeJSON(w, http.StatusOK, wire.ListAnswer{Sessions: wireSessions(page.Sessions), NextToken: page.NextToken})
}

// read runs a read that may block. Blocking reads are limited in number, and end when the
// server shuts down or the caller's credential expires.
func (a *API) read(r *http.Request, block scheduler.Block, read func(context.Context) error) error {
	if block.Index == 0 {
		return read(r.Context())
	}
	leave, err := a.enter(a.waiting, scheduler.CallerFrom(r.Context()))
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := a.whileServed(r.Context())
	defer cancel()
	err = read(ctx)
	if why, ok := errors.AsType[*apiError](context.Cause(ctx)); ok && err != nil {
		return why
	}
	return err
}

func setIndex(w http.ResponseWriter, index uint64) {
	w.Header().Set(wire.HeaderIndex, strconv.FormatUint(index, 10))
}

func (a *API) renew(w http.ResponseWriter, r *http.Request, _ query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	fields, err := readFields(r, "ttl")
	if err != nil {
		return err
	}
	d, err := ttl(fields)
	if err != nil {
		return err
	}
	session, err := a.config.Sessions.Renew(r.Context(), chat, d)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, wire.SessionAnswer{Session: wireSession(session)})
}

func (a *API) delete(w http.ResponseWriter, r *http.Request, _ query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	if _, err := readFields(r); err != nil {
		return err
	}
	res, err := a.config.Sessions.Delete(r.Context(), chat)
	if err != nil {
		return err
	}
	body := wire.DeleteAnswer{Result: "not_found", ChatID: chat}
	if res.Found {
		body = wire.DeleteAnswer{Result: "deleted", ChatID: chat, SessionID: res.SessionID, ContainerID: res.ContainerID}
	}
	return writeJSON(w, http.StatusOK, body)
}

func (a *API) cleanup(w http.ResponseWriter, r *http.Request, _ query) error {
	if _, err := readFields(r); err != nil {
		return err
	}
	res, err := a.config.Sessions.CleanupExpired(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, wire.CleanupAnswer{Cleaned: wireSessions(res.Cleaned), ErrorCount: res.ErrorCount})
}

func (a *API) repair(w http.ResponseWriter, r *http.Request, _ query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	if _, err := readFields(r); err != nil {
		return err
	}
	res, err := a.config.Sessions.Repair(r.Context(), chat)
	if err != nil {
		return err
	}
	body := wire.RepairAnswer{Result: string(res.Result)}
	if res.Session != nil {
		auditSession(w, *res.Session)
		body.Session = new(wireSession(*res.Session))
	}
	return writeJSON(w, http.StatusOK, body)
}

// wireSession returns the session as answers show it, without its access token.
func wireSession(s scheduler.Session) wire.Session {
	out := wire.Session{
		SessionID:      s.SessionID,
		ChatID:         s.ChatID,
		AgentID:        s.AgentID,
		VolumeHostPath: s.VolumeHostPath,
		Runtime:        s.Runtime,
		ContainerID:    s.ContainerID,
		CreatedAt:      s.CreatedAt.UTC(),
		ExpiresAt:      s.ExpiresAt.UTC(),
		State:          string(s.State),
		Reason:         s.Reason,
		Owner:          s.Owner,
		Labels:         s.Labels,
		Warm:           s.Warm,
	}
	if out.Labels == nil {
		out.Labels = map[string]string{} // not null
	}
	if s.Endpoint.IsValid() {
		out.Endpoint = &runtime.Endpoint{IP: s.Endpoint.IP, Port: s.Endpoint.Port}
	}
	return out
}

func wireSessions(sessions []scheduler.Session) []wire.Session {
	out := make([]wire.Session, len(sessions)) // not nil, which would become null
	for i, s := range sessions {
		out[i] = wireSession(s)
	}
	return out
}
