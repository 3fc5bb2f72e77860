package api

import (
	"net/http"
	"slices"
	"strings"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

// maxText is the maximum length of the text that a list is filtered by, in bytes.
const maxText = 256

// filter returns the function that selects the sessions of a list by its parameters
// state and text, or nil if it has neither.
func (q query) filter() (func(scheduler.Session) bool, error) {
	state, text := scheduler.State(q["state"]), strings.ToLower(q["text"])
	if state == "" && text == "" {
		return nil, nil
	}
	if state != "" && !slices.Contains(scheduler.States(), state) {
		return nil, invalid("state is none of %s", stateNames())
	}
	if len(q["text"]) > maxText {
		return nil, invalid("text is over %d bytes", maxText)
	}
	if q["index"] != "" {
		// Each change would read all records again for each waiting caller.
		return nil, invalid("index cannot be combined with state or text")
	}
	return func(s scheduler.Session) bool {
		return (state == "" || s.State == state) && (text == "" || contains(s, text))
	}, nil
}

func stateNames() string {
	var names []string
	for _, state := range scheduler.States() {
		names = append(names, string(state))
	}
	return strings.Join(names, ", ")
}

// contains reports whether the text, in lower case, is in what a person would look for:
// the chat ID, the AI agent's ID, the reason, or a label as KEY=VALUE.
func contains(s scheduler.Session, text string) bool {
	for _, field := range []string{s.ChatID.String(), s.AgentID, s.Reason} {
		if strings.Contains(strings.ToLower(field), text) {
			return true
		}
	}
	for key, value := range s.Labels {
		if strings.Contains(strings.ToLower(key+"="+value), text) {
			return true
		}
	}
	return false
}

// counts answers with the number of sessions by state.
func (a *API) counts(w http.ResponseWriter, r *http.Request, q query) error {
	auditAgent(w, q["agent_id"])
	counts, at, err := a.config.Sessions.Counts(r.Context(), q["agent_id"])
	if err != nil {
		return err
	}
	body := wire.CountsAnswer{Counts: make(map[string]int, len(counts)), CountedAt: at.UTC()}
	for state, n := range counts {
		body.Counts[string(state)] = n
	}
	return writeJSON(w, http.StatusOK, body)
}
