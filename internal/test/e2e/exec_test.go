package e2e

import (
	"fmt"
	"net/http"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/exectest"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// TestExec runs commands through the API of a whole replica.
func TestExec(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		if template == "docker" {
			stack.NeedShell(t)
		}
		w := newWorld(t, template)
		one, two := w.start(), w.start()
		chat := uuid.NewString()
		created := one.create(chat, w.body(), http.StatusCreated).Session

		// A command answers with its output and exit code, through each replica.
		command := wire.ExecRequest{Command: []string{"sh", "-c", `cat; echo "$A" >&2; exit 3`}, Stdin: "hello", Env: map[string]string{"A": "b"}}
		ran := call[wire.ExecAnswer](two, http.MethodPost, sessionPath(chat)+"/exec", command, http.StatusOK)
		must.Eq(t, wire.ExecAnswer{ExitCode: new(3), Stdout: "hello", Stderr: "b\n", Truncated: []string{}}, ran)

		// One whose time is over is killed with its children.
		marker := exectest.NewMarker()
		family := wire.ExecRequest{Command: []string{"sh", "-c", exectest.Family, "sh", marker}, Timeout: "2s"}
		ran = call[wire.ExecAnswer](one, http.MethodPost, sessionPath(chat)+"/exec", family, http.StatusOK)
		must.Eq(t, wire.ExecAnswer{TimedOut: true, Stdout: "started\n", Truncated: []string{}}, ran)
		exectest.AwaitGone(t, marker)

		// When the replica that runs it is killed, the command is killed, too, and the
		// sandbox lives on.
		family.Timeout = "10m"
		answered := make(chan error, 1)
		go func() {
			_, _, err := one.try(http.MethodPost, sessionPath(chat)+"/exec", family)
			answered <- err
		}()
		exectest.AwaitRunning(t, marker, 3)
		one.stop(syscall.SIGKILL)
		must.Error(t, <-answered)
		exectest.AwaitGone(t, marker)
		must.Eq(t, created.SessionID, two.get(chat).SessionID)

		// When the session is deleted meanwhile, the caller is told why there is no exit code.
		refused := make(chan string, 1)
		go func() {
			status, text, err := two.try(http.MethodPost, sessionPath(chat)+"/exec", family)
			refused <- fmt.Sprint(status, " ", string(text), err)
		}()
		exectest.AwaitRunning(t, marker, 3)
		two.delete(chat)
		text := <-refused
		must.StrContains(t, text, "409 ")
		must.StrContains(t, text, string(wire.CodeNotRunning))
		exectest.AwaitGone(t, marker)
	})
}
