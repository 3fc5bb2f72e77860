package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// testTurns replaces every credential while callers use two replicas, and checks that no
// session is lost.
func testTurns(t *testing.T, s *secured) {
	replicas := []*replica{s.startOn(0), s.startOn(2)}
	var stays []wire.Session
	for range 5 {
		stays = append(stays, replicas[0].create(uuid.NewString(), s.body(), http.StatusCreated).Session)
	}
	load := startLoad(t, s, replicas)

	// after waits until the replicas serve again, and checks that all sessions stayed.
	after := func(what string) {
		t.Helper()
		took, failures := load.awaitRecovery()
		t.Logf("%s: the last failure came %v later: %v", what, took.Round(time.Millisecond), failures)
		must.Less(t, 20*time.Second, took, must.Sprint(what))
		for _, session := range stays {
			for _, r := range replicas {
				found := r.get(session.ChatID.String())
				must.Eq(t, session.SessionID, found.SessionID, must.Sprint(what))
				must.Eq(t, "running", found.State, must.Sprint(what))
			}
			must.Len(t, 1, processes(t, session), must.Sprint(what))
		}
	}

	old := s.nomadToken
	s.newNomadToken()
	must.NoError(t, s.nomads.DeleteToken(t.Context(), old))
	after("a new token for Nomad, and the old one deleted")

	old = s.consulToken
	s.newConsulToken()
	must.NoError(t, s.consuls.DeleteToken(t.Context(), old))
	after("a new token for Consul, and the old one deleted")

	must.NoError(t, s.nomads.DeleteToken(t.Context(), s.nomadToken))
	load.awaitFailure(wire.CodeServerPermissionDenied)
	s.newNomadToken()
	after("the token for Nomad deleted before there was a new one")

	must.NoError(t, s.consuls.DeleteToken(t.Context(), s.consulToken))
	load.awaitFailure("")
	s.newConsulToken()
	after("the token for Consul deleted before there was a new one")

	writeTLS(t, s.mine, s.ca, s.ca.Issue(t, "bivouac"))
	after("a new certificate")

	next := certs.NewCA(t)
	both := &certs.CA{PEM: slices.Concat(s.ca.PEM, next.PEM)}
	reload := func() {
		must.NoError(t, s.nomads.Reload())
		must.NoError(t, s.consuls.Reload())
	}
	writeTLS(t, s.mine, both, s.ca.Issue(t, "bivouac"))
	writeTLS(t, s.theirs, both, s.ca.Issue(t, stack.AgentNames()...))
	reload()
	after("a bundle of the old and the new CA")
	writeTLS(t, s.mine, both, next.Issue(t, "bivouac"))
	writeTLS(t, s.theirs, both, next.Issue(t, stack.AgentNames()...))
	reload()
	after("certificates of the new CA")
	writeTLS(t, s.mine, next, next.Issue(t, "bivouac"))
	writeTLS(t, s.theirs, next, next.Issue(t, stack.AgentNames()...))
	reload()
	after("the new CA alone")

	// Connections from before may still be used. After this all are new.
	for _, agent := range []*stack.Agent{s.nomads.Servers[0], s.consuls.Servers[0], s.consuls.Servers[2]} {
		must.NoError(t, agent.Restart(t.Context()))
	}
	after("a restart of the servers")

	load.stop()
	for i, session := range stays {
		replicas[i%len(replicas)].delete(session.ChatID.String())
		must.SliceEmpty(t, processes(t, session))
	}
	for _, r := range replicas {
		r.awaitHealthy()
	}
	eventually(t, "nothing is left in Nomad", func() error {
		allocs, _, err := s.nomad.Allocations().List(nil)
		for _, a := range allocs {
			if a.ClientStatus == nomad.AllocClientStatusRunning {
				err = errors.Join(err, errors.New(a.Name+" runs"))
			}
		}
		return err
	})
}

const (
	// callers is the number of callers of each replica.
	callers = 2
	// quiet is how long no request may fail until the replicas count as recovered. It is
	// longer than the replicas take to notice that a file has changed.
	quiet = 5 * time.Second
)

// load calls replicas all the time, until it is stopped. Each caller creates, reads, renews
// and deletes a session of its own, again and again.
type load struct {
	t    *testing.T
	stop func() // stops all callers, and checks that no answer was wrong

	mu       sync.Mutex
	rounds   []time.Time    // when the last round of each caller that succeeded began
	failed   time.Time      // when the last request failed
	failures map[string]int // since the last recovery, by error code
	wrong    []string       // answers that are wrong at any time
}

func startLoad(t *testing.T, s *secured, replicas []*replica) *load {
	t.Helper()
	l := &load{t: t, failures: make(map[string]int), rounds: make([]time.Time, callers*len(replicas))}
	ctx, cancel := context.WithCancel(t.Context())
	var calling sync.WaitGroup
	for i := range l.rounds {
		calling.Go(func() {
			for ctx.Err() == nil {
				l.round(i, replicas[i%len(replicas)], s.body())
			}
		})
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		calling.Wait()
		must.SliceEmpty(t, l.wrong)
	})
	t.Cleanup(l.stop)
	return l
}

// round is one life of a session. It returns when the session is gone.
func (l *load) round(caller int, r *replica, body wire.CreateRequest) {
	began := time.Now()
	chat := uuid.NewString()
	well := l.call(r, http.MethodPut, sessionPath(chat), body, http.StatusCreated)
	if well {
		well = l.call(r, http.MethodGet, sessionPath(chat), nil, http.StatusOK)
		well = l.call(r, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{TTL: "1h"}, http.StatusOK) && well
	}
	for r.t.Context().Err() == nil && !l.call(r, http.MethodDelete, sessionPath(chat), nil, http.StatusOK) {
		well = false
	}
	if well {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.rounds[caller] = began
	}
}

// call makes a request and reports whether it succeeded. A request may fail only because
// Nomad or Consul cannot be used.
func (l *load) call(r *replica, method, path string, body any, want int) bool {
	status, text, err := r.try(method, path, body)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && status == want {
		return true
	}
	l.failed = time.Now()
	var answer wire.ErrorAnswer
	switch {
	case err == nil && (status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout):
		err = json.Unmarshal(text, &answer)
		l.failures[string(answer.Error.Code)]++
	case err == nil:
		err = fmt.Errorf("status %d: %s", status, text)
	}
	if err != nil && r.t.Context().Err() == nil {
		l.wrong = append(l.wrong, fmt.Sprintf("%s %s: %v", method, path, err))
	}
	return false
}

// awaitFailure waits until a request failed with the code, or with any if it is empty.
func (l *load) awaitFailure(code wire.Code) {
	l.t.Helper()
	eventually(l.t, "a request fails: "+string(code), func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.failures[string(code)] > 0 || code == "" && len(l.failures) > 0 {
			return nil
		}
		return fmt.Errorf("failures: %v", l.failures)
	})
}

// awaitRecovery waits until no request has failed for a while and all callers have finished
// a round in that time. It returns how long requests went on failing, and how many failed
// since the last recovery, by error code.
func (l *load) awaitRecovery() (took time.Duration, failures map[string]int) {
	l.t.Helper()
	began := time.Now()
	eventually(l.t, "the replicas serve again", func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		last := began
		if l.failed.After(began) {
			last = l.failed
		}
		lags := slices.ContainsFunc(l.rounds, func(round time.Time) bool { return round.Before(last) })
		if lags || time.Since(last) < quiet {
			return errors.New("not yet")
		}
		took, failures, l.failures = last.Sub(began), l.failures, make(map[string]int)
		return nil
	})
	return took, failures
}
