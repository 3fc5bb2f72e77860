package nomad_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// secured is a Nomad with ACLs.
type secured struct {
	*stack.Nomad
	management *api.Client
}

func withACL(t *testing.T) secured {
	t.Helper()
	stack.NeedServers(t)
	n, err := stack.StartNomad(t.Context(), stack.NomadConfig{Drivers: []string{"raw_exec"}, ManagementToken: uuid.NewString()})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	management, err := n.Client()
	must.NoError(t, err)
	return secured{n, management}
}

// replicaWith opens a replica with a token whose policy has the given rules.
func (s secured) replicaWith(t *testing.T, rules string) replica {
	t.Helper()
	token, err := s.NewToken(t.Context(), rules)
	must.NoError(t, err)
	client, err := s.Client()
	must.NoError(t, err)
	client.SetSecretID(token.Secret)
	return open(t, client, rawExec(t, nil), "test-"+uuid.NewString())
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
	servers := withACL(t)
	well := servers.replicaWith(t, enough)
	must.NoError(t, well.Health(patiently(t)))
	narrow := servers.replicaWith(t, `
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
			err := servers.replicaWith(t, tc.rules).Health(patiently(t))
			t.Log(err)
			must.ErrorIs(t, err, runtime.ErrPermission)
			for _, says := range tc.says {
				must.ErrorContains(t, err, says)
			}
		})
	}
	must.SliceEmpty(t, jobIDs(t, servers.management), must.Sprint("to look changes nothing"))

	t.Run("registrations that an operator turned off", func(t *testing.T) {
		setScheduler(t, servers.management, func(c *api.SchedulerConfiguration) { c.RejectJobRegistration = true })
		health := servers.replicaWith(t, enough).Health(patiently(t))
		t.Log(health)
		spec := newSpec(t, well)
		_, create := well.Create(patiently(t), spec, ignore)
		setScheduler(t, servers.management, func(c *api.SchedulerConfiguration) { c.RejectJobRegistration = false })
		for _, err := range []error{health, create} {
			must.ErrorIs(t, err, runtime.ErrPermission)
			must.ErrorContains(t, err, "Job registration, dispatch, and scale are disabled by the scheduler configuration")
		}
		must.ErrorContains(t, health, "-reject-job-registration=false")
	})

	t.Run("a paused eval broker", func(t *testing.T) {
		setScheduler(t, servers.management, func(c *api.SchedulerConfiguration) { c.PauseEvalBroker = true })
		health := well.awaitHealth(t, "paused")
		hidden := narrow.Health(patiently(t))
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		quick, err := jobs.Load("raw_exec", map[string]string{"ready_timeout": "1s"})
		must.NoError(t, err)
		spec := newSpec(t, well)
		_, create := open(t, well.client, quick, well.instance).Create(ctx, spec, ignore)
		setScheduler(t, servers.management, func(c *api.SchedulerConfiguration) { c.PauseEvalBroker = false })
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

// TestRun_tells_that_Nomad_denies_the_stream checks that the log has Nomad's reason within
// seconds. Nomad answers 200 to a stream before it checks the token, and then stays silent.
func TestRun_tells_that_Nomad_denies_the_stream(t *testing.T) {
	t.Parallel()
	servers := withACL(t)
	token, err := servers.NewToken(t.Context(), `namespace "default" { capabilities = ["list-jobs"] }`)
	must.NoError(t, err)
	lines := make(logLines, 100)
	openWith(t, servers.Nomad, credentials.NewToken(token.Secret), hclog.New(&hclog.LoggerOptions{Output: lines}))
	began := time.Now()
	line := lines.await(t, "nomad_stream_lost")
	must.Less(t, 30*time.Second, time.Since(began))
	must.StrContains(t, line, "list allocations")
	must.StrContains(t, line, "Permission denied")
}

// TestHealth_tells_of_a_stream_that_stays_silent covers a stream that is open, and that
// Nomad does not deny.
func TestHealth_tells_of_a_stream_that_stays_silent(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	must.NoError(t, r.awaitHealth(t))
	p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		if req.URL.Path != "/v1/event/stream" {
			return false
		}
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		<-req.Context().Done()
		return true
	})
	p.breakStreams()
	must.ErrorIs(t, r.awaitHealth(t, "follow events", "the event stream brings nothing"), runtime.ErrUnavailable)
	p.setFault(nil)
	p.breakStreams()
	must.NoError(t, r.awaitHealth(t))
}

// TestToken_turns checks that a token can be replaced while it is used: a request that
// Nomad denies is repeated with the new one, and the stream is opened anew.
func TestToken_turns(t *testing.T) {
	t.Parallel()
	servers := withACL(t)
	path := filepath.Join(t.TempDir(), "token")
	turn := func() stack.Token {
		token, err := servers.NewToken(t.Context(), enough)
		must.NoError(t, err)
		must.NoError(t, os.WriteFile(path, []byte(token.Secret+"\n"), 0o600))
		return token
	}
	first := turn()
	token, err := credentials.TokenFile(path)
	must.NoError(t, err)
	r := openWith(t, servers.Nomad, token, testLogger(t))
	must.NoError(t, r.Current(patiently(t)))
	deaths := watch(t, r)

	turn()
	must.NoError(t, servers.DeleteToken(t.Context(), first))
	spec := newSpec(t, r)
	_, err = r.Create(patiently(t), spec, ignore)
	must.NoError(t, err)
	must.NotEq(t, first.Secret, token.Value())

	// The stream of the deleted token brings nothing more, so a death shows that there
	// is another one.
	_, _, err = servers.management.Jobs().Deregister(jobs.ID(spec.SessionID), false, nil)
	must.NoError(t, err)
	for dead := range deaths {
		must.Eq(t, spec.SessionID, dead.SessionID)
		if dead.State == runtime.StateDead {
			break
		}
	}
	must.NoError(t, r.awaitHealth(t))
}

// openWith starts a replica with its own token and log.
func openWith(t *testing.T, n *stack.Nomad, token nomad.Token, log hclog.Logger) replica {
	t.Helper()
	client, err := n.Client()
	must.NoError(t, err)
	client.SetSecretID("")
	template, instance := rawExec(t, nil), "test-"+uuid.NewString()
	driver, err := nomad.New(nomad.Config{Client: client, Token: token, Template: template, Instance: instance, Logger: log})
	must.NoError(t, err)
	run(t, driver)
	return replica{driver, client, template, instance}
}

// logLines receives the lines of a log.
type logLines chan string

func (l logLines) Write(line []byte) (int, error) {
	select {
	case l <- string(line):
	default: // the test has what it needs
	}
	return len(line), nil
}

// await returns the next line that contains a word.
func (l logLines) await(t *testing.T, word string) string {
	t.Helper()
	limit := time.After(patience)
	for {
		select {
		case line := <-l:
			t.Log(line)
			if strings.Contains(line, word) {
				return line
			}
		case <-limit:
			t.Fatalf("no line of the log contains %q", word)
		}
	}
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
	p.setFault(func(_ http.ResponseWriter, req *http.Request, _ http.Handler) bool {
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
	must.NoError(t, r.awaitHealth(t))
}
