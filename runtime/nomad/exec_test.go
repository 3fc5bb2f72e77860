package nomad_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/coder/websocket"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/exectest"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

func TestExec_raw_exec(t *testing.T) {
	t.Parallel()
	testExec(t, rawExec(t, nil))
}

func TestExec_docker(t *testing.T) {
	t.Parallel()
	template, err := jobs.Load("docker", map[string]string{"image": stack.DockerForTest(t)})
	must.NoError(t, err)
	stack.NeedShell(t)
	testExec(t, template)
}

func testExec(t *testing.T, template *jobs.Template) {
	r := openShared(t, template)
	newSandbox := func(t *testing.T) string {
		sandbox, err := r.Create(patiently(t), newSpec(t, r), ignore)
		must.NoError(t, err)
		return sandbox.SessionID
	}
	exectest.Run(t, exectest.Harness{Driver: r, SessionID: newSandbox(t), MostExecs: 16, Output: 24, NewSandbox: newSandbox})
}

// TestExec_refuses_a_task_that_only_Nomad_knows_to_be_missing asks for another task than the
// caller: until Nomad has reported the tasks of a sandbox, the driver cannot know them.
func TestExec_refuses_a_task_that_only_Nomad_knows_to_be_missing(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	sandbox, err := r.Create(patiently(t), newSpec(t, r), ignore)
	must.NoError(t, err)
	p.setFault(func(_ http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		if query := req.URL.Query(); query.Has("task") {
			query.Set("task", "no-such-task")
			req.URL.RawQuery = query.Encode()
		}
		return false
	})
	_, err = r.Exec(patiently(t), sandbox.SessionID, runtime.Command{Args: []string{"true"}}, runtime.Streams{})
	must.ErrorIs(t, err, runtime.ErrInvalid)
	must.ErrorContains(t, err, "no such task")
}

// TestExec_waits_for_a_command_that_does_not_read_its_input sends more than fits between the
// driver and the command, which begins to read later than any other message may take.
func TestExec_waits_for_a_command_that_does_not_read_its_input(t *testing.T) {
	t.Parallel()
	r := openShared(t, rawExec(t, nil))
	sandbox, err := r.Create(patiently(t), newSpec(t, r), ignore)
	must.NoError(t, err)
	const size = 32 << 20
	var stdout bytes.Buffer
	code, err := r.Exec(patiently(t), sandbox.SessionID, runtime.Command{Args: []string{"sh", "-c", "sleep 35; wc -c"}},
		runtime.Streams{Stdin: strings.NewReader(strings.Repeat("x", size)), Stdout: &stdout})
	must.NoError(t, err)
	must.EqOp(t, 0, code)
	must.EqOp(t, fmt.Sprintln(size), stdout.String())
}

// TestExec_runs_a_command_once_although_Nomad_says_too_early_that_it_ended imitates Nomad's
// docker driver: it takes a process that Docker is about to start for one that has ended. The
// process starts nevertheless, without a connection.
func TestExec_runs_a_command_once_although_Nomad_says_too_early_that_it_ended(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	sandbox, err := r.Create(patiently(t), newSpec(t, r), ignore)
	must.NoError(t, err)
	_, err = r.Exec(patiently(t), sandbox.SessionID, runtime.Command{Args: []string{"true"}}, runtime.Streams{})
	must.NoError(t, err) // Nomad knows now that the task runs

	nomad := "http://" + stack.NomadForTest(t).Addr()
	var asked atomic.Int32
	p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
		if !strings.HasSuffix(req.URL.Path, "/exec") {
			return false
		}
		switch asked.Add(1) {
		case 1, 3: // the first guard, and the command beside the second one
		default:
			return false
		}
		started, _, err := websocket.Dial(req.Context(), nomad+req.URL.RequestURI(), nil)
		if err == nil {
			defer func() { _ = started.CloseNow() }()
			_, _, err = started.Read(req.Context()) // so it runs
		}
		if err == nil {
			var caller *websocket.Conn
			if caller, err = websocket.Accept(w, req, nil); err == nil {
				err = caller.Write(req.Context(), websocket.MessageText, []byte(`{"exited":true,"result":{"exit_code":0}}`))
				_ = caller.Close(websocket.StatusNormalClosure, "")
			}
		}
		if err != nil {
			t.Error(err)
		}
		return true
	})

	runs := filepath.Join(t.TempDir(), "runs")
	var stdout bytes.Buffer
	code, err := r.Exec(patiently(t), sandbox.SessionID,
		runtime.Command{Args: []string{"sh", "-c", `echo run >>"$1"; read -r word; echo "$word"; exit 3`, "sh", runs}},
		runtime.Streams{Stdin: strings.NewReader("hello\n"), Stdout: &stdout})
	must.NoError(t, err)
	must.EqOp(t, 3, code)
	must.EqOp(t, "hello\n", stdout.String())
	must.EqOp(t, 5, asked.Load())
	text, err := os.ReadFile(runs)
	must.NoError(t, err)
	must.EqOp(t, "run\n", string(text))
}
