package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	consul "github.com/hashicorp/consul/api"
	nomad "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/apitest"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// world is one Bivouac: any number of replicas on one Nomad and one Consul key
// prefix.
type world struct {
	t        *testing.T
	nomad    *nomad.Client
	consul   *consul.Client
	prefix   string
	instance string
	volume   string       // a directory that contains a file hello.txt
	api      *http.Client // checks every answer against openapi.json
	env      []string
	flags    []string
}

// newWorld returns a Bivouac with the named job template.
func newWorld(t *testing.T, template string, flags ...string) *world {
	c, prefix := stack.ConsulForTest(t)
	n := stack.NomadForTest(t)
	w := newWorldOn(t, n, c, prefix, template, flags...)
	w.env = append(w.env, "CONSUL_HTTP_ADDR="+c.Addr(), "NOMAD_ADDR=http://"+n.Addr())
	return w
}

// newWorldOn is like newWorld, on other servers and with a given KV prefix. The replicas do
// not know yet where the servers are.
func newWorldOn(t *testing.T, n *stack.Nomad, c *stack.Consul, prefix, template string, flags ...string) *world {
	consulClient, err := c.Client()
	must.NoError(t, err)
	nomadClient, err := n.Client()
	must.NoError(t, err)
	w := &world{
		t:        t,
		nomad:    nomadClient,
		consul:   consulClient,
		prefix:   prefix,
		instance: strings.ToLower(strings.TrimSuffix(prefix, "/")),
		volume:   t.TempDir(),
		api:      &http.Client{Transport: apitest.New(t, nil), Timeout: callLimit},
		env:      os.Environ(),
	}
	must.NoError(t, os.WriteFile(filepath.Join(w.volume, "hello.txt"), []byte("from the host"), 0o644))
	must.NoError(t, os.Chmod(w.volume, 0o755))
	w.flags = append([]string{"-kv-prefix=" + prefix, "-instance=" + w.instance, "-job-template=" + template,
		"-cleanup-interval=1s", "-log-level=debug", "-job-var=ready_timeout=" + patience.String()}, flags...)
	if template == "docker" {
		w.flags = append(w.flags, "-job-var=image="+stack.DockerForTest(t))
	}
	return w
}

// replica is one running Bivouac server.
type replica struct {
	*stack.Bivouac
	t   *testing.T
	api *http.Client
}

// start starts a replica and waits until it is healthy.
func (w *world) start() *replica {
	w.t.Helper()
	r := w.launch()
	eventually(w.t, "a healthy replica", func() error {
		if !r.Running() {
			w.t.Fatal("the replica ended")
		}
		status, _, err := r.try(http.MethodGet, "/v1/agent/health", nil)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("health answers %d", status)
		}
		return err
	})
	return r
}

// launch starts a replica.
func (w *world) launch() *replica {
	w.t.Helper()
	return w.launchBuild(binary, w.api)
}

// launchBuild starts a replica from another binary. api is the HTTP client that
// calls it.
func (w *world) launchBuild(binary string, api *http.Client) *replica {
	w.t.Helper()
	port, err := stack.FreePort(0)
	must.NoError(w.t, err)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	server, err := stack.NewBivouac("the replica at "+addr, binary, addr, filepath.Join(w.t.TempDir(), "agent.log"), w.env, w.flags...)
	must.NoError(w.t, err)
	must.NoError(w.t, server.Start())
	r := &replica{server, w.t, api}
	w.t.Cleanup(func() {
		r.stop(syscall.SIGINT)
		if w.t.Failed() {
			text, err := os.ReadFile(r.Log)
			w.t.Logf("log of %s (%v):\n%s", r.Name, err, text)
		}
	})
	return r
}

// stop sends a signal to the replica and waits until it has ended.
func (r *replica) stop(sig syscall.Signal) {
	if !r.Running() {
		return
	}
	must.NoError(r.t, r.Signal(sig))
	select {
	case <-r.Done():
	case <-time.After(patience):
		_ = r.Kill() // the error below fails the test
		r.t.Errorf("%s did not end within %v of %v", r.Name, patience, sig)
	}
}

// awaitFailing waits until the replica is unhealthy and its health names the
// part.
func (r *replica) awaitFailing(part string) {
	r.t.Helper()
	eventually(r.t, "health names "+part, func() error {
		status, text, err := r.try(http.MethodGet, "/v1/agent/health", nil)
		if err == nil && (status != http.StatusServiceUnavailable || !strings.Contains(string(text), part)) {
			err = fmt.Errorf("status %d: %s", status, text)
		}
		return err
	})
}

// hasLogged waits until the replica has logged a line with all of the words.
func (r *replica) hasLogged(words ...string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("a line of the log with %q", words), func() error {
		text, err := os.ReadFile(r.Log)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
				return nil
			}
		}
		return errors.New("not yet")
	})
}

// try makes one request.
func (r *replica) try(method, path string, body any) (status int, answer []byte, err error) {
	var reader io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		reader = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(r.t.Context(), method, "http://"+r.Addr+path, reader)
	if err != nil {
		return 0, nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := r.api.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	return resp.StatusCode, answer, err
}

// patience is how long these tests wait for what should happen within seconds.
// It is long because the machine may be busy.
const patience = 90 * time.Second

// callLimit is much longer than any call takes.
const callLimit = patience + time.Minute

// call makes one request, checks the status of the answer and decodes it.
func call[A any](r *replica, method, path string, body any, want int) A {
	r.t.Helper()
	status, answer, err := r.try(method, path, body)
	must.NoError(r.t, err)
	must.Eq(r.t, want, status, must.Sprintf("%s %s: %s", method, path, answer))
	var a A
	must.NoError(r.t, json.Unmarshal(answer, &a))
	return a
}

func (w *world) body() wire.CreateRequest {
	return wire.CreateRequest{AgentID: "agent-1", VolumeHostPath: w.volume}
}

func sessionPath(chat string) string { return "/v1/sessions/" + chat }

func (r *replica) create(chat string, body wire.CreateRequest, status int) wire.CreateAnswer {
	r.t.Helper()
	return call[wire.CreateAnswer](r, http.MethodPut, sessionPath(chat), body, status)
}

func (r *replica) get(chat string) wire.Session {
	r.t.Helper()
	return call[wire.GetAnswer](r, http.MethodGet, sessionPath(chat), nil, http.StatusOK).Session
}

func (r *replica) delete(chat string) wire.DeleteAnswer {
	r.t.Helper()
	return call[wire.DeleteAnswer](r, http.MethodDelete, sessionPath(chat), nil, http.StatusOK)
}

// page reads a page of the sandbox's own server.
func page(t *testing.T, s wire.Session, path string) (string, error) {
	t.Helper()
	must.NotNil(t, s.Endpoint)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Endpoint.AddrPort().String()+path, nil)
	must.NoError(t, err)
	resp, err := (&http.Client{Timeout: patience}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return string(text), err
}

// processes returns the PIDs on this machine that have the session's
// environment.
func processes(t *testing.T, s wire.Session) []int {
	t.Helper()
	pids, err := stack.ProcessesWith("BIVOUAC_SESSION_ID=" + s.SessionID.String())
	must.NoError(t, err)
	return pids
}

// liveAllocs returns the live allocations of the chat's sessions.
func (w *world) liveAllocs(chat string) []*nomad.AllocationListStub {
	w.t.Helper()
	allocs, _, err := w.nomad.Allocations().List(&nomad.QueryOptions{})
	must.NoError(w.t, err)
	var live []*nomad.AllocationListStub
	for _, a := range allocs {
		if a.ClientStatus == nomad.AllocClientStatusComplete || a.ClientStatus == nomad.AllocClientStatusFailed {
			continue
		}
		job, _, err := w.nomad.Jobs().Info(a.JobID, nil)
		if err == nil && job.Meta["chat_id"] == chat {
			live = append(live, a)
		}
	}
	return live
}

// jobs returns the IDs of this Bivouac's jobs in Nomad, including dead ones.
func (w *world) jobs() []string {
	w.t.Helper()
	list, _, err := w.nomad.Jobs().ListOptions(&nomad.JobListOptions{Fields: &nomad.JobListFields{Meta: true}}, nil)
	must.NoError(w.t, err)
	var ids []string
	for _, j := range list {
		if strings.HasPrefix(j.Meta["bivouac_instance"], w.instance+"-") {
			ids = append(ids, j.ID)
		}
	}
	return ids
}

// keys returns the Consul keys that contain the chat ID.
func (w *world) keys(chat string) []string {
	w.t.Helper()
	all, _, err := w.consul.KV().Keys(w.prefix, "", nil)
	must.NoError(w.t, err)
	var keys []string
	for _, k := range all {
		if strings.Contains(k, chat) {
			keys = append(keys, k)
		}
	}
	return keys
}

// createUnderWay begins a create and returns when its sandbox runs. The channel
// receives the answer.
func createUnderWay(w *world, r *replica, chat string) <-chan string {
	answered := make(chan string, 1)
	go func() {
		status, text, err := r.try(http.MethodPut, sessionPath(chat), w.body())
		answered <- fmt.Sprint(status, " ", string(text), " ", err)
	}()
	eventually(w.t, "the sandbox runs", func() error {
		if len(w.liveAllocs(chat)) == 0 {
			return fmt.Errorf("no allocation yet")
		}
		return nil
	})
	return answered
}

// awaitNothing waits until nothing of a chat is left and the replica answers
// that it has no session.
func (w *world) awaitNothing(r *replica, chat string) {
	w.t.Helper()
	eventually(w.t, "nothing is left", func() error {
		if live, keys := len(w.liveAllocs(chat)), w.keys(chat); live > 0 || len(keys) > 0 {
			return fmt.Errorf("%d allocations, keys %q", live, keys)
		}
		return nil
	})
	_ = call[wire.ErrorAnswer](r, http.MethodGet, sessionPath(chat), nil, http.StatusNotFound)
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(check), wait.Timeout(patience), wait.Gap(50*time.Millisecond)),
		must.Sprint(what))
}
