package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestHundredCreatesShareOneStart(t *testing.T) {
	t.Parallel()
	// Given three replicas, and a hundred callers that want the sandbox of one
	// chat.
	w := newWorld(t, "raw_exec")
	replicas := []*replica{w.start(), w.start(), w.start()}
	chat := uuid.NewString()
	const callers = 100
	answers := make([]wire.CreateAnswer, callers)
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			status, text, err := replicas[i%len(replicas)].try(http.MethodPut, sessionPath(chat), w.body())
			if err == nil && status != http.StatusOK && status != http.StatusCreated {
				err = fmt.Errorf("status %d: %s", status, text)
			}
			if err == nil {
				err = json.Unmarshal(text, &answers[i])
			}
			errs[i] = err
		})
	}
	wg.Wait()

	// Then one caller created it, all others reused it, and there is only one
	// sandbox.
	created := 0
	for i, a := range answers {
		must.NoError(t, errs[i])
		must.Eq(t, answers[0].Session, a.Session)
		if a.Result == "created" {
			created++
		} else {
			must.Eq(t, "reused", a.Result)
		}
	}
	must.Eq(t, 1, created)
	must.Len(t, 1, w.liveAllocs(chat))
	must.Len(t, 1, w.jobs())
	replicas[0].delete(chat)
}

func TestSandboxThatDiedIsReplaced(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		w := newWorld(t, template)
		r := w.start()
		chat := uuid.NewString()
		first := r.create(chat, w.body(), http.StatusCreated).Session

		// When the sandbox's process is killed, the session is dead and has the
		// reason.
		pids := processes(t, first)
		must.SliceNotEmpty(t, pids)
		for _, pid := range pids {
			must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		}
		eventually(t, "the session is dead", func() error {
			if s := r.get(chat); s.State != "dead" || s.Reason == "" {
				return fmt.Errorf("state %s, reason %q", s.State, s.Reason)
			}
			return nil
		})
		must.StrContains(t, r.get(chat).Reason, "137")

		// What happened is told in Nomad's words.
		told := call[wire.WhyAnswer](r, http.MethodGet, sessionPath(chat)+"/why", nil, http.StatusOK).Sessions[0]
		must.Eq(t, "dead", told.State)
		must.StrContains(t, told.Outcome, `task "sandbox" ended: exit code 137`)
		var texts []string
		for _, one := range told.Events {
			texts = append(texts, one.Source+": "+one.Text)
		}
		text := strings.Join(texts, "\n")
		must.StrContains(t, text, "bivouac: created by anonymous")
		must.StrContains(t, text, "nomad: placed on node ")
		must.StrContains(t, text, `nomad: task "sandbox": terminated: exit code 137`)

		// Then it cannot be renewed, and a create replaces it.
		refused := call[wire.ErrorAnswer](r, http.MethodPost, sessionPath(chat)+"/renew", wire.RenewRequest{}, http.StatusConflict)
		must.Eq(t, wire.CodeNotRunning, refused.Error.Code)
		next := r.create(chat, w.body(), http.StatusCreated)
		must.Eq(t, "replaced", next.Result)
		must.NotEq(t, first.ContainerID, next.Session.ContainerID)
		r.delete(chat)
	})
}

func TestSandboxStoppedByAnOperatorIsToldSo(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	r := w.start()
	chat := uuid.NewString()
	first := r.create(chat, w.body(), http.StatusCreated).Session
	_, _, err := w.nomad.Jobs().Deregister("bivouac-"+first.SessionID.String(), false, nil)
	must.NoError(t, err)
	eventually(t, "the session is dead", func() error {
		if s := r.get(chat); s.State != "dead" || !strings.Contains(s.Reason, "stopped") {
			return fmt.Errorf("state %s, reason %q", s.State, s.Reason)
		}
		return nil
	})
	r.delete(chat)
}

func TestCreateThatCannotSucceedLeavesNothing(t *testing.T) {
	t.Parallel()
	const huge = "100000000"
	for _, tc := range []struct {
		name, template string
		flags          []string
		status         int
		code           wire.Code
		says           string
	}{
		{"no room", "raw_exec", []string{"-job-var=memory=" + huge}, http.StatusServiceUnavailable, wire.CodeNotPlaced, "memory"},
		{"command missing", "raw_exec", []string{"-job-var=command=/does/not/exist"}, http.StatusServiceUnavailable, wire.CodeNotReady, "/does/not/exist"},
		{"exits at once", "raw_exec", []string{"-job-var=command=/bin/false"}, http.StatusServiceUnavailable, wire.CodeNotReady, "exit"},
		{"never answers", "raw_exec", []string{"-job-var=command=/bin/sleep", `-job-var=args=["300"]`, "-job-var=ready_timeout=2s"}, http.StatusGatewayTimeout, wire.CodeNotReady, "the last readiness check: "},
		{"job rejected", "raw_exec", []string{"-job-var=cpu=0"}, http.StatusBadRequest, wire.CodeRuntimeInvalid, "minimum CPU"},
		{"image missing", "docker", []string{"-job-var=image=bivouac-no-such-image:dev"}, http.StatusServiceUnavailable, wire.CodeNotReady, "image"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, tc.template)
			w.flags = append(w.flags, tc.flags...)
			r := w.launch()
			chat := uuid.NewString()
			var failed wire.ErrorAnswer
			// If Nomad rejects the job, the replica never becomes healthy.
			eventually(t, "the answer "+string(tc.code), func() error {
				_, body, err := r.try(http.MethodPut, sessionPath(chat), w.body())
				if err == nil {
					err = json.Unmarshal(body, &failed)
				}
				if err == nil && failed.Error.Code != tc.code {
					err = fmt.Errorf("it is %s", failed.Error.Code)
				}
				return err
			})
			failed = call[wire.ErrorAnswer](r, http.MethodPut, sessionPath(chat), w.body(), tc.status)
			must.Eq(t, tc.code, failed.Error.Code)
			must.StrContains(t, failed.Error.Message, tc.says)
			must.SliceEmpty(t, w.jobs())
			must.SliceEmpty(t, w.keys(chat))
		})
	}
}

func TestReplicaThatStopsLeavesSandboxesRunning(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	first := w.start()
	chat := uuid.NewString()
	session := first.create(chat, w.body(), http.StatusCreated).Session

	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		first.stop(sig)
		_, err := page(t, session, "/")
		must.NoError(t, err)
		first = w.start()
		must.Eq(t, session, first.get(chat))
		reused := first.create(chat, w.body(), http.StatusOK)
		must.Eq(t, session, reused.Session)
	}
	first.delete(chat)
}

func TestReplicaKilledInMidCreateIsSettledByAnother(t *testing.T) {
	t.Parallel()
	// Given a replica that is killed while its sandbox is starting.
	w := newWorld(t, "raw_exec")
	w.flags = append(w.flags, "-job-var=command=/bin/sleep", `-job-var=args=["300"]`)
	killed, survivor := w.start(), w.start()
	chat := uuid.NewString()
	answered := createUnderWay(w, killed, chat)
	killed.stop(syscall.SIGKILL)
	<-answered

	// Then the other replica undoes the create: no sandbox, record or lock is
	// left.
	w.awaitNothing(survivor, chat)
}

func TestReplicaThatStartsBeforeConsul(t *testing.T) {
	// Given a replica that starts before its Consul.
	w := newWorld(t, "raw_exec")
	port, err := stack.FreePort(0)
	must.NoError(t, err)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	w.env = append(w.env, "CONSUL_HTTP_ADDR="+addr)
	r := w.launch()
	r.awaitFailing("consul")
	chat := uuid.NewString()
	refused := call[wire.ErrorAnswer](r, http.MethodPut, sessionPath(chat), w.body(), http.StatusServiceUnavailable)
	must.Eq(t, wire.CodeStoreUnavailable, refused.Error.Code)

	// When Consul comes, the replica serves.
	c, err := stack.StartConsul(t.Context(), stack.ConsulConfig{HTTPPort: port})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, c.Stop()) })
	eventually(t, "a create succeeds", func() error {
		status, text, err := r.try(http.MethodPut, sessionPath(chat), w.body())
		if err == nil && status != http.StatusCreated {
			err = fmt.Errorf("status %d: %s", status, text)
		}
		return err
	})
	r.delete(chat)
	r.stop(syscall.SIGINT)
}
