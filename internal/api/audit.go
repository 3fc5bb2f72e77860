package api

import (
	"cmp"
	"net/http"
	"strings"

	"github.com/bivouac/bivouac/internal/audit"
	"github.com/bivouac/bivouac/scheduler"
)

// isAudited reports whether requests with this access are in the audit log. Health, the
// metrics and the description of the API are not.
func (a access) isAudited() bool {
	return a == authenticated || a == operatorRead || a == operatorWrite
}

// received writes to the audit log that a request begins, and returns the request with
// the context for its handler. After an error the request must not be handled.
func (a *API) received(ans *answer, r *http.Request) (*http.Request, error) {
	ans.audited = newOperation(ans, r)
	if r.Pattern == execPath {
		ans.audited.Command = auditedCommand(r)
	}
	ctx, err := a.config.Audit.Begin(r.Context(), ans.audited)
	return r.WithContext(ctx), err
}

// audit writes to the audit log that a request is done, or that it was refused before its
// handler began.
func (a *API) audit(ans *answer, r *http.Request) {
	if a.config.Audit == nil {
		return
	}
	op, write := ans.audited, a.config.Audit.End
	if op == nil {
		switch ans.status {
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
			op, write = newOperation(ans, r), a.config.Audit.Refuse
			_, op.Endpoint = a.mux.Handler(r)
		default:
			return // it is not audited, or it reached no handler
		}
	}
	op.Status = ans.status
	if ans.err != nil {
		op.Error = string(errorFor(ans.err, ans.store).code)
	}
	write(op)
}

// newOperation returns a request as the audit log shows it: without its query and its
// headers, which may contain secrets.
func newOperation(ans *answer, r *http.Request) *audit.Operation {
	op := &audit.Operation{
		Caller: ans.caller, RequestID: ans.requestID,
		Method: r.Method, Endpoint: r.Pattern, UserAgent: r.UserAgent(),
	}
	op.Caller.Name = cmp.Or(op.Caller.Name, scheduler.DefaultOwner)
	op.Caller.Address = r.RemoteAddr
	for part := range strings.SplitSeq(r.URL.Path, "/") {
		if id, err := parseChatID(part); err == nil {
			op.ChatID = id
		}
	}
	return op
}

// auditSession adds the session that a read found to the audit log's line.
func auditSession(w http.ResponseWriter, session scheduler.Session) {
	if ans, ok := w.(*answer); ok && ans.audited != nil {
		ans.audited.Session = &session
	}
}

// auditAgent adds the AI agent whose sessions were asked for to the audit log's line.
func auditAgent(w http.ResponseWriter, agentID string) {
	if ans, ok := w.(*answer); ok && ans.audited != nil {
		ans.audited.AgentID = agentID
	}
}
