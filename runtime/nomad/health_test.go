package nomad_test

import (
	"context"
	"io"
	"net/http"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// withACL starts a Nomad with ACLs. replicaWith opens a replica with a token
// whose policy has the given rules.
func withACL(t *testing.T) (management *api.Client, replicaWith func(rules string) replica) {
	t.Helper()
	stack.NeedServers(t)
	n, err := stack.StartNomad(t.Context(), stack.NomadConfig{Drivers: []string{"raw_exec"}, ManagementToken: uuid.NewString()})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	management, err = n.Client()
	must.NoError(t, err)
	return management, func(rules string) replica {
		name := "p-" + uuid.NewString()
		_, err := management.ACLPolicies().Upsert(&api.ACLPolicy{Name: name, Rules: rules}, nil)
		must.NoError(t, err)
		token, _, err := management.ACLTokens().Create(&api.ACLToken{Name: name, Type: "client", Policies: []string{name}}, nil)
		must.NoError(t, err)
		client, err := n.Client()
		must.NoError(t, err)
		client.SetSecretID(token.SecretID)
		return open(t, client, rawExec(t, nil), "test-"+uuid.NewString())
	}
}

// enough is the policy that the package comment asks for.
const enough = `
	namespace "default" { capabilities = ["list-jobs", "read-job", "submit-job"] }
	node { policy = "read" }
	operator { policy = "read" }`

func jobIDs(t *testing.T, client *api.Client) (ids []string) {
	t.Helper()
	list, _, err := client.Jobs().List(nil)
	must.NoError(t, err)
	for _, job := range list {
		ids = append(ids, job.ID)
	}
	return ids
}

// TestHealth_finds_what_the_token_lacks checks that Health reports a missing
// permission before a sandbox is requested, in Nomad's words.
func TestHealth_finds_what_the_token_lacks(t *testing.T) {
	t.Parallel()
	management, replicaWith := withACL(t)
	well := replicaWith(enough)
	must.NoError(t, well.Health(patiently(t)))
	narrow := replicaWith(`
		namespace "default" { capabilities = ["list-jobs", "read-job", "register-job", "deregister-job", "purge-job"] }
		node { policy = "read" }`)
	must.NoError(t, narrow.Health(patiently(t)))

	cases := []struct {
		name, rules string
		says        []string
	}{
		{"a token that may only read", `
			namespace "default" { policy = "read" }
			node { policy = "read" }`, []string{"try to register a job", "Permission denied", "submit-job"}},
		{"no list-jobs", `namespace "default" { capabilities = ["submit-job"] }`, []string{"list jobs", "Permission denied", "list-jobs"}},
		{"no read-job", `namespace "default" { capabilities = ["list-jobs", "submit-job"] }`, []string{"read a job", "Permission denied", "read-job"}},
		{"no purge-job", `namespace "default" { capabilities = ["list-jobs", "read-job", "register-job", "deregister-job"] }`, []string{"try to purge a job", "Permission denied", "purge-job"}},
		{"no right to read nodes", `namespace "default" { capabilities = ["list-jobs", "read-job", "submit-job"] }`, []string{"read a node", "Permission denied", `node { policy = "read" }`}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			err := replicaWith(tc.rules).Health(patiently(t))
			t.Log(err)
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			for _, says := range tc.says {
				must.ErrorContains(t, err, says)
			}
		})
	}
	must.SliceEmpty(t, jobIDs(t, management), must.Sprint("to look changes nothing"))

	t.Run("registrations that an operator turned off", func(t *testing.T) {
		setScheduler(t, management, func(c *api.SchedulerConfiguration) { c.RejectJobRegistration = true })
		health := replicaWith(enough).Health(patiently(t))
		t.Log(health)
		spec := newSpec(t, well)
		_, create := well.Create(patiently(t), spec, ignore)
		setScheduler(t, management, func(c *api.SchedulerConfiguration) { c.RejectJobRegistration = false })
		for _, err := range []error{health, create} {
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, "Job registration, dispatch, and scale are disabled by the scheduler configuration")
		}
		must.ErrorContains(t, health, "-reject-job-registration=false")
	})

	t.Run("a paused eval broker", func(t *testing.T) {
		setScheduler(t, management, func(c *api.SchedulerConfiguration) { c.PauseEvalBroker = true })
		health := well.Health(patiently(t))
		hidden := narrow.Health(patiently(t))
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		quick, err := jobs.Load("raw_exec", map[string]string{"ready_timeout": "1s"})
		must.NoError(t, err)
		spec := newSpec(t, well)
		_, create := open(t, well.client, quick, well.instance).Create(ctx, spec, ignore)
		setScheduler(t, management, func(c *api.SchedulerConfiguration) { c.PauseEvalBroker = false })
		t.Log(health)
		t.Log(create)
		must.ErrorIs(t, health, runtime.ErrUnavailable)
		must.ErrorContains(t, health, "-pause-eval-broker=false")
		must.NoError(t, hidden, must.Sprint("without the right to see the scheduler's configuration"))
		must.ErrorIs(t, create, runtime.ErrNotReady)
		must.ErrorContains(t, create, "the evaluation of its job is pending")
	})
}

func setScheduler(t *testing.T, client *api.Client, change func(*api.SchedulerConfiguration)) {
	t.Helper()
	answer, _, err := client.Operator().SchedulerGetConfiguration(nil)
	must.NoError(t, err)
	change(answer.SchedulerConfig)
	_, _, err = client.Operator().SchedulerSetConfiguration(answer.SchedulerConfig, nil)
	must.NoError(t, err)
}

// TestHealth_tells_of_a_stream_that_Nomad_denies covers Nomad's answer to a
// stream without permission: it answers 200 before it checks the token, and
// then ends the stream with text that is not JSON.
func TestHealth_tells_of_a_stream_that_Nomad_denies(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	must.NoError(t, r.Health(patiently(t)))
	p.setFault(func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path != "/v1/event/stream" {
			return false
		}
		_, _ = io.WriteString(w, "Permission denied")
		return true
	})
	p.breakStreams()
	var health error
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.BoolFunc(func() bool {
		health = r.Health(patiently(t))
		return health != nil
	})))
	must.ErrorIs(t, health, runtime.ErrUnavailable)
	must.ErrorContains(t, health, "follow events")
	must.ErrorContains(t, health, "Permission denied")
	must.ErrorContains(t, health, "read-job")

	p.setFault(nil)
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.ErrorFunc(func() error { return r.Health(patiently(t)) })))
}

// TestHealth_finds_a_namespace_that_does_not_exist checks that the operator is
// blamed for that, not the caller.
func TestHealth_finds_a_namespace_that_does_not_exist(t *testing.T) {
	t.Parallel()
	for _, namespace := range []string{"no-such", "*"} {
		t.Run(namespace, func(t *testing.T) {
			client, err := stack.NomadForTest(t).Client()
			must.NoError(t, err)
			client.SetNamespace(namespace)
			r := open(t, client, rawExec(t, nil), "test-"+uuid.NewString())
			health := r.Health(patiently(t))
			t.Log(health)
			_, create := r.Create(patiently(t), newSpec(t, r), ignore)
			t.Log(create)
			for _, err := range []error{health, create} {
				must.ErrorIs(t, err, runtime.ErrUnavailable)
				must.False(t, isAny(err, runtime.ErrInvalid))
				must.ErrorContains(t, err, `is in nonexistent namespace "`+namespace+`"`)
			}
			must.ErrorContains(t, health, "NOMAD_NAMESPACE")
		})
	}
}

func TestHealth_finds_a_template_that_Nomad_rejects(t *testing.T) {
	t.Parallel()
	r := openShared(t, templateOf(t, "2s", task("raw_exec", shell("exec sleep 100"), `constraint {
		operator = "no such operator"
	}`)))
	err := r.Health(patiently(t))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, "no such operator")
	must.ErrorContains(t, err, "correct the job template")
}

// TestHealth_takes_no_place_of_other_requests checks that sandboxes can be
// created while many health checks wait for a slow Nomad.
func TestHealth_takes_no_place_of_other_requests(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec := newSpec(t, r)
	held := make(chan struct{}, 1000)
	p.setFault(func(_ http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path != "/v1/status/leader" {
			return false
		}
		held <- struct{}{}
		<-req.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range cap(held) {
		asking.Go(func() { _ = r.Health(ctx) })
	}
	<-held
	_, err := r.Create(patiently(t), spec, ignore)
	cancel()
	asking.Wait()
	p.setFault(nil)
	must.NoError(t, err)
	must.NoError(t, r.Health(patiently(t)))
}
