package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// policies are the least ones that Bivouac needs, as its users get them.
const policies = "../../../examples/deploy/acl"

// secured is one Bivouac on servers as in production: ACLs that deny by default, TLS with
// client certificates, and three Consul servers. Its tokens have the policies in examples,
// and its credentials are in files.
type secured struct {
	*world
	nomads      *stack.Nomad
	consuls     *stack.Consul
	ca          *certs.CA
	theirs      string // folder with the TLS files of Nomad and Consul
	mine        string // folder with the TLS files and tokens of Bivouac
	nomadToken  stack.Token
	consulToken stack.Token
}

func newSecured(t *testing.T) *secured {
	t.Helper()
	stack.NeedServers(t)
	s := &secured{ca: certs.NewCA(t), theirs: t.TempDir(), mine: t.TempDir()}
	files := writeTLS(t, s.theirs, s.ca, s.ca.Issue(t, stack.AgentNames()...))
	n, err := stack.StartNomad(t.Context(), stack.NomadConfig{
		Servers: 1, Clients: 1, Drivers: []string{"raw_exec"}, ManagementToken: uuid.NewString(), TLS: &files,
	})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	c, err := stack.StartConsul(t.Context(), stack.ConsulConfig{Servers: 3, ManagementToken: uuid.NewString(), TLS: &files})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, c.Stop()) })
	s.nomads, s.consuls = n, c
	s.world = newWorldOn(t, n, c, "bivouac/", "raw_exec", "-job-var=logs=true")
	_, err = s.nomad.Namespaces().Register(&nomad.Namespace{Name: "sandboxes"}, nil)
	must.NoError(t, err)
	s.nomad.SetNamespace("sandboxes")

	writeTLS(t, s.mine, s.ca, s.ca.Issue(t, "bivouac"))
	s.newNomadToken()
	s.newConsulToken()
	s.flags = append(s.flags, "-config="+s.config(s.mine, c.Addr()))
	return s
}

// writeTLS writes the TLS files of one side. It trusts the CA.
func writeTLS(t *testing.T, dir string, trusted *certs.CA, pair certs.Pair) stack.TLSFiles {
	ca, certificate, key := certs.Write(t, dir, trusted, pair)
	return stack.TLSFiles{CA: ca, Certificate: certificate, Key: key}
}

// newNomadToken makes a new token the one that Bivouac uses for Nomad.
func (s *secured) newNomadToken() {
	s.t.Helper()
	rules, err := os.ReadFile(filepath.Join(policies, "nomad-policy.hcl"))
	must.NoError(s.t, err)
	s.nomadToken, err = s.nomads.NewToken(s.t.Context(), string(rules))
	must.NoError(s.t, err)
	s.write("nomad.token", s.nomadToken.Secret)
}

// newConsulToken makes a new token the one that Bivouac uses for Consul.
func (s *secured) newConsulToken() {
	s.t.Helper()
	rules, err := os.ReadFile(filepath.Join(policies, "consul-policy.hcl"))
	must.NoError(s.t, err)
	s.consulToken, err = s.consuls.NewToken(s.t.Context(), string(rules))
	must.NoError(s.t, err)
	s.write("consul.token", s.consulToken.Secret)
}

func (s *secured) write(name, text string) {
	s.t.Helper()
	must.NoError(s.t, os.WriteFile(filepath.Join(s.mine, name), []byte(text+"\n"), 0o600))
}

// config writes a configuration file for a replica that uses one server of Consul, and
// credentials in dir. It returns the file's path.
func (s *secured) config(dir, consul string) string {
	s.t.Helper()
	text := fmt.Sprintf(`
consul {
  address    = "https://%[3]s"
  token_file = "%[1]s/consul.token"
  ca_file    = "%[1]s/ca.pem"
  cert_file  = "%[1]s/cert.pem"
  key_file   = "%[1]s/key.pem"
}
nomad {
  address    = "https://%[2]s"
  token_file = "%[1]s/nomad.token"
  ca_file    = "%[1]s/ca.pem"
  cert_file  = "%[1]s/cert.pem"
  key_file   = "%[1]s/key.pem"
  namespace  = "sandboxes"
}
`, dir, s.nomads.Addr(), consul)
	path := filepath.Join(s.t.TempDir(), "bivouac.hcl")
	must.NoError(s.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// startOn starts a replica that uses one server of Consul.
func (s *secured) startOn(server int) *replica {
	s.t.Helper()
	w := s.with("-config=" + s.config(s.mine, s.consuls.Servers[server].Addr))
	w.t = s.t
	return w.start()
}

// in returns the same Bivouac for a subtest.
func (s *secured) in(t *testing.T) *secured {
	own, w := *s, *s.world
	w.t, own.world = t, &w
	return &own
}

func TestSecuredServers(t *testing.T) {
	t.Parallel()
	s := newSecured(t)
	t.Run("the_least_policies_suffice_for_the_whole_life_of_sessions", func(t *testing.T) { testLife(t, s.in(t)) })
	t.Run("health_says_what_is_wrong_in_the_servers_words", func(t *testing.T) { testWords(t, s.in(t)) })
	t.Run("credentials_turn_in_the_middle_of_load", func(t *testing.T) { testTurns(t, s.in(t)) })
}

func testLife(t *testing.T, s *secured) {
	one, two := s.startOn(0), s.startOn(1)
	chat := uuid.NewString()

	// A session is created, and reused by another replica; other parameters are a conflict.
	created := one.create(chat, s.body(), http.StatusCreated)
	must.Eq(t, "created", created.Result)
	must.Eq(t, wire.CreateAnswer{Result: "reused", Session: created.Session, AccessToken: created.AccessToken}, two.create(chat, s.body(), http.StatusOK))
	other := s.body()
	other.AgentID = "agent-2"
	conflict := call[wire.ErrorAnswer](two, http.MethodPut, sessionPath(chat), other, http.StatusConflict)
	must.Eq(t, wire.CodeConflict, conflict.Error.Code)

	// It is listed, and renewed while another replica watches it.
	list := call[wire.ListAnswer](two, http.MethodGet, "/v1/sessions?agent_id=agent-1", nil, http.StatusOK)
	must.Eq(t, []wire.Session{created.Session}, list.Sessions)
	index := two.indexOf(chat)
	woken := make(chan string, 1)
	go func() {
		status, text, err := two.try(http.MethodGet, sessionPath(chat)+"?wait=2m&index="+index, nil)
		woken <- fmt.Sprint(status, " ", string(text), err)
	}()
	renewed := call[wire.SessionAnswer](one, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{TTL: "2h"}, http.StatusOK)
	expiry, err := json.Marshal(renewed.Session.ExpiresAt)
	must.NoError(t, err)
	must.StrContains(t, <-woken, string(expiry))

	// What it prints is read.
	must.NoError(t, tell(t, created.Session, "/print", "one\n"))
	eventually(t, "the log is read", func() error {
		if text := two.readLog(chat, ""); text != "one\n" {
			return fmt.Errorf("it is %q", text)
		}
		return nil
	})

	// A command runs in it.
	ran := call[wire.ExecAnswer](two, http.MethodPost, sessionPath(chat)+"/exec", wire.ExecRequest{Command: []string{"sh", "-c", "echo hello; exit 3"}}, http.StatusOK)
	must.Eq(t, wire.ExecAnswer{ExitCode: new(3), Stdout: "hello\n", Truncated: []string{}}, ran)

	// A sandbox that dies is noticed, and replaced.
	for _, pid := range processes(t, created.Session) {
		must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	eventually(t, "the session is dead", func() error {
		if now := two.get(chat); now.State != "dead" {
			return errors.New(now.State)
		}
		return nil
	})
	replaced := two.create(chat, s.body(), http.StatusCreated)
	must.Eq(t, "replaced", replaced.Result)

	// A session that expires is cleaned up.
	short := s.body()
	short.TTL = "5s"
	expiring := uuid.NewString()
	expired := one.create(expiring, short, http.StatusCreated).Session
	s.awaitNothing(two, expiring)
	must.SliceEmpty(t, processes(t, expired))

	// A sandbox without a record is stopped, if its chat has another one.
	orphan := s.copyJob(replaced.Session, nil)
	must.Wait(t, wait.InitialSuccess(wait.Timeout(4*time.Minute), wait.Gap(time.Second), wait.ErrorFunc(func() error {
		allocs, _, err := s.nomad.Jobs().Allocations(orphan, true, nil)
		if err == nil && len(allocs) > 0 && allocs[0].ClientStatus == nomad.AllocClientStatusRunning {
			err = errors.New("it runs")
		}
		return err
	})), must.Sprint("the orphan is stopped"))
	must.Eq(t, replaced.Session.SessionID, one.get(chat).SessionID)
	must.SliceNotEmpty(t, processes(t, replaced.Session))

	// A deleted session leaves nothing.
	must.Eq(t, "deleted", two.delete(chat).Result)
	must.SliceEmpty(t, processes(t, replaced.Session))
	s.awaitNothing(one, chat)
	for _, r := range []*replica{one, two} {
		r.awaitHealthy()
		log, err := os.ReadFile(r.Log)
		must.NoError(t, err)
		for line := range bytes.Lines(log) {
			must.False(t, bytes.Contains(line, []byte("Permission denied")), must.Sprintf("%s", line))
		}
		r.stop(syscall.SIGINT)
	}
}

// indexOf returns the index of a session, for a blocking read.
func (r *replica) indexOf(chat string) string {
	r.t.Helper()
	resp, err := r.api.Get("http://" + r.Addr + sessionPath(chat))
	must.NoError(r.t, err)
	must.NoError(r.t, resp.Body.Close())
	return resp.Header.Get(wire.HeaderIndex)
}

func testWords(t *testing.T, s *secured) {
	stranger := certs.NewCA(t)
	well := s.startOn(0) // so that what is below is not the first replica of a new Bivouac
	defer well.stop(syscall.SIGINT)
	for name, tc := range map[string]struct {
		spoil func(t *testing.T, dir string) // changes a copy of the credentials
		words []string                       // that health has
		code  wire.Code                      // of a create
	}{
		"a CA that did not issue Nomad's certificate": {
			func(t *testing.T, dir string) { writeTLS(t, dir, stranger, s.ca.Issue(t, "bivouac")) },
			[]string{"certificate signed by unknown authority"}, wire.CodeStoreUnavailable,
		},
		"a certificate of a CA that Nomad does not trust": {
			func(t *testing.T, dir string) { writeTLS(t, dir, s.ca, stranger.Issue(t, "bivouac")) },
			[]string{"tls: unknown certificate authority"}, wire.CodeServerPermissionDenied,
		},
		"a certificate that has expired": {
			func(t *testing.T, dir string) {
				writeTLS(t, dir, s.ca, s.ca.IssueFor(t, -time.Minute, "bivouac"))
			},
			[]string{"tls: expired certificate"}, wire.CodeServerPermissionDenied,
		},
		"a token that Nomad does not know": {
			func(t *testing.T, dir string) { writeFile(t, dir, "nomad.token", uuid.NewString()) },
			[]string{"list jobs", "Permission denied", "list-jobs"}, wire.CodeServerPermissionDenied,
		},
		"a token that may only read": {
			func(t *testing.T, dir string) {
				token, err := s.nomads.NewToken(t.Context(), `namespace "sandboxes" { policy = "read" } node { policy = "read" }`)
				must.NoError(t, err)
				writeFile(t, dir, "nomad.token", token.Secret)
			},
			[]string{"try to register a job", "Permission denied", "submit-job"}, wire.CodeServerPermissionDenied,
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			s := s.in(t)
			dir := t.TempDir()
			must.NoError(t, os.CopyFS(dir, os.DirFS(s.mine)))
			tc.spoil(t, dir)
			r := s.with("-config=" + s.config(dir, s.consuls.Addr())).launch()
			eventually(t, fmt.Sprintf("health says %q of Nomad", tc.words), func() error {
				_, text, err := r.try(http.MethodGet, "/v1/agent/health", nil)
				if err != nil {
					return err
				}
				var health wire.HealthAnswer
				must.NoError(t, json.Unmarshal(text, &health))
				for _, word := range tc.words {
					if !strings.Contains(health.Checks["nomad"].Error, word) {
						return fmt.Errorf("it says %q", health.Checks["nomad"].Error)
					}
				}
				t.Log(health.Checks["nomad"].Error)
				return nil
			})
			refused := call[wire.ErrorAnswer](r, http.MethodPut, sessionPath(uuid.NewString()), s.body(), http.StatusServiceUnavailable)
			must.Eq(t, tc.code, refused.Error.Code)
			t.Logf("%s", refused.Error.Message)
		})
	}
}

func writeFile(t *testing.T, dir, name, text string) {
	t.Helper()
	must.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
}
