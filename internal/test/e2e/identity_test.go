package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// with returns another operator's Bivouac on the same servers.
func (w *world) with(flags ...string) *world {
	other := *w
	other.flags = append(slices.Clone(w.flags), flags...)
	return &other
}

// refuses starts a replica that must end by itself, with exit status 1 and the
// words in its log.
func (w *world) refuses(words ...string) {
	w.t.Helper()
	r := w.launch()
	select {
	case <-r.Done():
	case <-time.After(patience):
		w.t.Fatal("the replica goes on")
	}
	must.Eq(w.t, 1, r.ExitCode())
	r.hasLogged(words...)
}

// purge removes the jobs of this Bivouac and of any with the same name.
func (w *world) purge() {
	for _, id := range w.jobs() {
		_, _, err := w.nomad.Jobs().Deregister(id, true, nil)
		must.NoError(w.t, err)
	}
}

// standsStill waits until health reports the words. It then checks that the
// replica refuses to create, read or delete a session.
func (r *replica) standsStill(w *world, chat string, words ...string) {
	r.t.Helper()
	for _, word := range words {
		r.awaitFailing(word)
	}
	for method, body := range map[string]any{http.MethodPut: w.body(), http.MethodGet: nil, http.MethodDelete: nil} {
		refused := call[wire.ErrorAnswer](r, method, sessionPath(chat), body, http.StatusServiceUnavailable)
		must.Eq(r.t, wire.CodeStoreUnavailable, refused.Error.Code)
	}
}

func (r *replica) awaitHealthy() string {
	r.t.Helper()
	var instance string
	eventually(r.t, "a healthy replica", func() error {
		status, text, err := r.try(http.MethodGet, "/v1/agent/health", nil)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("health answers %d: %s", status, text)
		}
		return err
	})
	instance = call[wire.HealthAnswer](r, http.MethodGet, "/v1/agent/health", nil, http.StatusOK).Instance
	must.Eq(r.t, instance, call[wire.SelfAnswer](r, http.MethodGet, "/v1/agent/self", nil, http.StatusOK).Instance)
	return instance
}

// isListed waits until other replicas see this one.
func (r *replica) isListed() {
	r.t.Helper()
	eventually(r.t, "the replica in the list of replicas", func() error {
		self := call[wire.SelfAnswer](r, http.MethodGet, "/v1/agent/self", nil, http.StatusOK)
		for _, other := range self.Replicas {
			if slices.Contains(other.Addresses, r.Addr) && other.Version == self.Version {
				return nil
			}
		}
		return fmt.Errorf("there are %v", self.Replicas)
	})
}

func TestReplicaThatIsToldOfAnotherBivouacRefusesToStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	chat := uuid.NewString()
	session := r.create(chat, w.body(), http.StatusCreated).Session

	w.with("-instance=another").refuses(w.prefix+"v1/identity", "-instance="+w.instance, "-kv-prefix")
	elsewhere := w.with()
	elsewhere.env = append(slices.Clone(w.env), "NOMAD_NAMESPACE=elsewhere")
	elsewhere.refuses(w.prefix+"v1/identity", `namespace "default"`, `namespace "elsewhere"`)
	elsewhere.env = append(slices.Clone(w.env), "NOMAD_REGION=elsewhere")
	elsewhere.refuses(w.prefix+"v1/identity", `region "elsewhere"`)

	must.Eq(t, session, r.get(chat))
	must.Len(t, 1, processes(t, session))
	r.delete(chat)
}

func TestTwoBivouacsWithOneNameOnOneNomad(t *testing.T) {
	t.Parallel()
	// Given one Bivouac with sandboxes, and another one of the same name with
	// its records elsewhere.
	one := newWorld(t, "raw_exec")
	t.Cleanup(one.purge)
	first := one.start()
	ours := first.create(uuid.NewString(), one.body(), http.StatusCreated).Session
	two := one.with("-kv-prefix=" + one.prefix + "two/")
	second := two.launch()

	// Then the second one touches nothing and reports what the operator has to
	// decide.
	chat := uuid.NewString()
	second.standsStill(two, chat, "1 sandboxes run under the name", "bivouac operator forget", "bivouac operator adopt")
	second.hasLogged("identity_unknown", "bivouac operator forget")

	// When the operator tells it that the sandboxes belong to another Bivouac,
	// both work side by side.
	forgotten := call[wire.ForgetAnswer](second, http.MethodPost, "/v1/operator/forget", nil, http.StatusOK)
	must.Len(t, 1, forgotten.Left)
	must.Eq(t, first.awaitHealthy(), forgotten.Left[0].Instance)
	must.Eq(t, forgotten.Instance, second.awaitHealthy())
	theirs := second.create(chat, two.body(), http.StatusCreated).Session
	list := call[wire.ListAnswer](second, http.MethodGet, "/v1/sessions", nil, http.StatusOK)
	must.Eq(t, []wire.Session{theirs}, list.Sessions)
	must.Len(t, 1, processes(t, ours))
	must.Eq(t, 404, status(t, second, sessionPath(ours.ChatID.String())))
	must.Eq(t, 404, status(t, first, sessionPath(chat)))

	// And the command in the answer shows who owns the sandboxes.
	filter := strings.Split(forgotten.Left[0].Look, "'")[1]
	jobs, _, err := one.nomad.Jobs().List(&nomad.QueryOptions{Filter: filter})
	must.NoError(t, err)
	must.Len(t, 1, jobs)
	must.StrContains(t, jobs[0].ID, ours.SessionID.String())

	first.delete(ours.ChatID.String())
	must.Len(t, 1, processes(t, theirs))
	second.delete(chat)
}

func status(t *testing.T, r *replica, path string) int {
	t.Helper()
	status, _, err := r.try(http.MethodGet, path, nil)
	must.NoError(t, err)
	return status
}

func TestConsulThatLosesItsDataUnderReplicas(t *testing.T) {
	t.Parallel()
	// Given two replicas with sandboxes, and an operator who deletes all keys.
	w := newWorld(t, "raw_exec")
	t.Cleanup(w.purge)
	replicas := []*replica{w.start(), w.start()}
	instance := replicas[0].awaitHealthy()
	must.Eq(t, instance, replicas[1].awaitHealthy())
	replicas[0].isListed()
	var sessions []wire.Session
	for i := range 4 {
		sessions = append(sessions, replicas[i%2].create(uuid.NewString(), w.body(), http.StatusCreated).Session)
	}
	_, err := w.consul.KV().DeleteTree(w.prefix, nil)
	must.NoError(t, err)

	// Then neither of them does anything, and neither does a replica that
	// starts after that.
	for _, r := range replicas {
		r.standsStill(w, sessions[0].ChatID.String(), "Consul lost the identity of this Bivouac", instance)
	}
	third := w.launch()
	third.standsStill(w, sessions[0].ChatID.String(), "4 sandboxes run under the name", instance)
	for _, s := range sessions {
		must.Len(t, 1, processes(t, s))
	}

	// When an operator says that the sandboxes belong to this Bivouac, all
	// replicas continue.
	refused := call[wire.ErrorAnswer](third, http.MethodPost, "/v1/operator/adopt", nil, http.StatusBadRequest)
	must.StrContains(t, refused.Error.Message, "bivouac operator adopt -instance="+instance)
	adopted := call[wire.AdoptAnswer](third, http.MethodPost, "/v1/operator/adopt", wire.AdoptRequest{Instance: instance}, http.StatusOK)
	must.Eq(t, instance, adopted.Instance)
	for _, r := range append(replicas, third) {
		must.Eq(t, instance, r.awaitHealthy())
		r.isListed()
	}
	for _, s := range sessions {
		must.Len(t, 1, processes(t, s))
	}
}
