package audit

import (
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// The stages of a line.
const (
	stageReceived = "OperationReceived" // the operation begins
	stageComplete = "OperationComplete" // it is done or has failed
	stageGap      = "Gap"               // lines are missing here
)

// maxText bounds a text that a caller may choose freely, in bytes.
const maxText = 256

// line is a line of the log. Names and nesting are those of Nomad's audit log, with the
// session, the result and the node added, so that what reads the one can read the other.
type line struct {
	CreatedAt time.Time `json:"created_at"`
	EventType string    `json:"event_type"`
	Payload   payload   `json:"payload"`
}

type payload struct {
	ID        string    `json:"id"` // of this line
	Stage     string    `json:"stage"`
	Type      string    `json:"type"`
	Timestamp time.Time `json:"timestamp"`
	Version   int       `json:"version"`
	Node      string    `json:"node"`
	Auth      *auth     `json:"auth,omitempty"`
	Request   *request  `json:"request,omitempty"`
	Session   *session  `json:"session,omitempty"`
	Previous  *session  `json:"previous_session,omitempty"`
	Response  *response `json:"response,omitempty"`
	Omitted   int       `json:"omitted,omitempty"` // requests that were refused since the last such line
	Gap       *gap      `json:"gap,omitempty"`
}

// auth is who asked. It contains no secret.
type auth struct {
	AccessorID string   `json:"accessor_id,omitempty"` // a JWT's jti
	Name       string   `json:"name"`                  // of a token, or a JWT's subject
	Method     string   `json:"method,omitempty"`      // "token", or "jwt/NAME"
	Policies   []string `json:"policies,omitempty"`
}

// request is what was asked.
type request struct {
	ID        string       `json:"id,omitempty"`       // the request ID; of background work none
	Operation string       `json:"operation"`          // HTTP method, or what Bivouac does by itself
	Endpoint  string       `json:"endpoint,omitempty"` // path of the API
	ChatID    string       `json:"chat_id,omitempty"`
	AgentID   string       `json:"agent_id,omitempty"` // that the caller named
	Command   *Command     `json:"command,omitempty"`  // to run in the sandbox
	Meta      *requestMeta `json:"request_meta,omitempty"`
}

type requestMeta struct {
	RemoteAddress string `json:"remote_address"`
	UserAgent     string `json:"user_agent,omitempty"`
}

// session is the session that the operation found or made.
type session struct {
	SessionID      string `json:"session_id"`
	AgentID        string `json:"agent_id"`
	Owner          string `json:"owner"`
	VolumeHostPath string `json:"volume_host_path"`
	Runtime        string `json:"runtime"`
	ContainerID    string `json:"container_id,omitempty"`
}

// response is what became of it.
type response struct {
	StatusCode int    `json:"status_code,omitempty"` // of HTTP
	Result     string `json:"result,omitempty"`
	Error      string `json:"error,omitempty"`     // a code of the API
	ExitCode   *int   `json:"exit_code,omitempty"` // of the command
}

// gap says that lines are missing.
type gap struct {
	Lost  int       `json:"lost"`
	Since time.Time `json:"since"`
}

// entry returns the payload of an operation that has begun.
func (op *Operation) entry() payload {
	return payload{
		Auth: newAuth(op.Caller),
		Request: &request{
			ID:        op.RequestID,
			Operation: clip(op.Method),
			Endpoint:  op.Endpoint,
			ChatID:    idOf(op.ChatID),
			AgentID:   clip(op.AgentID),
			Command:   op.Command,
			Meta:      &requestMeta{RemoteAddress: op.Caller.Address, UserAgent: clip(op.UserAgent)},
		},
	}
}

// completed returns the payload of an operation that is done.
func (op *Operation) completed() payload {
	p := op.entry()
	p.Stage = stageComplete
	p.Session, p.Previous = newSession(op.Session), newSession(op.Previous)
	p.Response = &response{StatusCode: op.Status, Result: op.Result, Error: op.Error, ExitCode: op.ExitCode}
	return p
}

func newAuth(caller scheduler.Caller) *auth {
	a := &auth{AccessorID: clip(caller.Accessor), Name: clip(caller.Name), Method: caller.Method}
	for _, policy := range caller.Policies {
		a.Policies = append(a.Policies, policy.Name)
	}
	return a
}

func newSession(s *scheduler.Session) *session {
	if s == nil {
		return nil
	}
	return &session{
		SessionID:      s.SessionID.String(),
		AgentID:        s.AgentID,
		Owner:          s.Owner,
		VolumeHostPath: s.VolumeHostPath,
		Runtime:        s.Runtime,
		ContainerID:    s.ContainerID,
	}
}

// idOf returns an ID as text, or "" for the nil UUID.
func idOf(id uuid.UUID) string {
	if id == uuid.Nil {
		return ""
	}
	return id.String()
}

// clip shortens a text. It removes what is not UTF-8, which would be six bytes for each
// byte.
func clip(text string) string {
	if len(text) <= maxText {
		return strings.ToValidUTF8(text, "")
	}
	return strings.ToValidUTF8(text[:maxText], "") + "…"
}
