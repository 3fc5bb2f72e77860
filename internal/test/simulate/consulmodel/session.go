package consulmodel

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// session is a Consul session with the behavior "delete": when it ends, its
// keys are deleted.
type session struct {
	id    string
	name  string
	ttl   time.Duration
	delay time.Duration // lock-delay of its keys
	timer *time.Timer
}

func (s *Server) serveSession(rest string, body []byte) *http.Response {
	verb, id, _ := strings.Cut(rest, "/")
	s.mu.Lock()
	defer s.mu.Unlock()
	switch verb {
	case "create":
		return s.createSession(body)
	case "renew":
		held := s.sessions[id]
		if held == nil {
			return network.Text(http.StatusNotFound, fmt.Sprintf("Session id '%s' not found", id))
		}
		s.renew(held)
		return answer(http.StatusOK, 0, []map[string]any{{"ID": id, "Name": held.name, "TTL": held.ttl.String()}})
	case "destroy":
		s.invalidate(id)
		return answer(http.StatusOK, 0, true)
	default:
		panic("consulmodel: no model of session " + verb)
	}
}

func (s *Server) createSession(body []byte) *http.Response {
	var asked struct{ Name, TTL, LockDelay, Behavior string }
	if err := json.Unmarshal(body, &asked); err != nil {
		return network.Text(http.StatusBadRequest, err.Error())
	}
	ttl, err := time.ParseDuration(asked.TTL)
	if err != nil || asked.Behavior != "delete" {
		panic("consulmodel: no model of this session: " + string(body))
	}
	delay := 15 * time.Second
	if asked.LockDelay != "" {
		if delay, err = time.ParseDuration(asked.LockDelay); err != nil {
			return network.Text(http.StatusBadRequest, err.Error())
		}
	}
	s.index++
	s.lastID++
	id := fmt.Sprintf("5e551011-0000-4000-8000-%012x", s.lastID)
	made := &session{id: id, name: asked.Name, ttl: ttl, delay: delay}
	made.timer = time.AfterFunc(s.lifetime(made), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.leading { // otherwise the next leader resets the timer
			s.invalidate(id)
		}
	})
	s.sessions[id] = made
	return answer(http.StatusOK, 0, map[string]string{"ID": id})
}

func (s *Server) renew(held *session) { held.timer.Reset(s.lifetime(held)) }

func (s *Server) lifetime(held *session) time.Duration {
	return time.Duration(held.ttl.Seconds() * float64(s.expireAfter))
}

// invalidate ends a session and deletes the keys that it has locked.
func (s *Server) invalidate(id string) {
	held := s.sessions[id]
	if held == nil {
		return
	}
	held.timer.Stop()
	delete(s.sessions, id)
	s.index++
	for _, p := range s.below("") {
		if p.Session != id {
			continue
		}
		if held.delay > 0 {
			s.delays[p.Key] = time.Now().Add(held.delay)
		}
		s.remove(p.Key, s.index)
	}
}

// Sessions returns the names of the live sessions, by ID.
func (s *Server) Sessions() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make(map[string]string)
	for id, held := range s.sessions {
		names[id] = held.name
	}
	return names
}

// DestroySession ends a session, as an operator would by hand.
func (s *Server) DestroySession(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.invalidate(id)
}
