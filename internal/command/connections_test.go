package command

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestIdleConnectionsDoNotShutCreatesOut(t *testing.T) {
	// Given an agent that may have few files open, and more connections than that
	// on which nobody asks for anything.
	program, err := exec.LookPath("bivouac")
	must.NoError(t, err)
	port, err := stack.FreePort(0)
	must.NoError(t, err)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	dir := t.TempDir()
	env := append(os.Environ(), "HOME="+dir, "XDG_CACHE_HOME="+dir, "BIVOUAC_ADDR=http://"+addr)
	agent := exec.Command("sh", "-c", `ulimit -n 128; exec "$0" agent -dev -http-addr="$1"`, program, addr)
	agent.Env = env
	must.NoError(t, agent.Start())
	t.Cleanup(func() {
		must.NoError(t, agent.Process.Signal(os.Interrupt))
		must.NoError(t, agent.Wait())
	})
	var conns []net.Conn
	t.Cleanup(func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
	dial := func() error {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
		if err == nil {
			conns = append(conns, conn)
		}
		return err
	}
	must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(dial), wait.Timeout(patience), wait.Gap(20*time.Millisecond)))
	for range 300 {
		must.NoError(t, dial())
	}

	// Then a create is served.
	create := exec.CommandContext(t.Context(), program, "session", "create", "-agent-id=a", "-volume-host-path="+dir, uuid.NewString())
	create.Env = env
	began := time.Now()
	out, err := create.CombinedOutput()
	must.NoError(t, err, must.Sprint(string(out)))
	must.Less(t, 9*time.Second, time.Since(began), must.Sprint("no connection had to time out for it"))
}
