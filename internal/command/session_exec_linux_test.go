package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"
	"golang.org/x/sys/unix"

	tty "github.com/bivouac/bivouac/internal/terminal"
	"github.com/bivouac/bivouac/internal/test/exectest"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime"
)

// devServer is a -dev server with a session.
type devServer struct {
	*exec.Cmd
	url, chat string
}

// startDev starts a -dev server with a session. It ends with the test.
func startDev(t *testing.T) devServer {
	t.Helper()
	port, err := stack.FreePort(0)
	must.NoError(t, err)
	addr, home := fmt.Sprintf("127.0.0.1:%d", port), t.TempDir()
	s := devServer{exec.Command("bivouac", "agent", "-dev", "-http-addr="+addr), "http://" + addr, uuid.NewString()}
	s.Env = append(os.Environ(), "HOME="+home, "XDG_CACHE_HOME="+home)
	must.NoError(t, s.Start())
	t.Cleanup(func() {
		_ = s.Process.Signal(syscall.SIGTERM) // it may have been killed
		_ = s.Wait()
		// What a killed server left is ended by its helper, which locks a file there.
		must.Wait(t, wait.InitialSuccess(wait.Timeout(exectest.Patience), wait.ErrorFunc(func() error { return os.RemoveAll(filepath.Join(home, "bivouac")) })))
	})
	must.Wait(t, wait.InitialSuccess(wait.Timeout(exectest.Patience), wait.ErrorFunc(func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+"/v1/agent/health", nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		return errors.Join(res.Body.Close(), map[bool]error{false: errors.New(res.Status)}[res.StatusCode == http.StatusOK])
	})))
	output, err := s.bivouac(t.Context(), "session", "create", "-agent-id=a", "-volume-host-path="+t.TempDir(), s.chat).CombinedOutput()
	must.NoError(t, err, must.Sprint(string(output)))
	return s
}

func (s devServer) bivouac(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "bivouac", args...)
	cmd.Env = append(os.Environ(), "BIVOUAC_ADDR="+s.url, "TERM=dumb")
	return cmd
}

// exec runs "session exec" with options, and the command after "--".
func (s devServer) exec(t *testing.T, options []string, command ...string) *exec.Cmd {
	args := append([]string{"session", "exec"}, options...)
	return s.bivouac(t.Context(), append(append(args, s.chat, "--"), command...)...)
}

func TestSessionExec(t *testing.T) {
	stack.NeedServers(t) // it takes a while
	s := startDev(t)

	for name, tc := range map[string]struct {
		options        []string
		stdin          string
		command        []string
		code           int
		stdout, stderr string
	}{
		"returns_what_the_command_does": {nil, "", []string{"sh", "-c", "echo out; echo err >&2; exit 3"}, 3, "out\n", "err\n"},
		"passes_options_to_the_command": {nil, "", []string{"echo", "-i", "-t", "--", "-x"}, 0, "-i -t -- -x\n", ""},
		"passes_the_input":              {[]string{"-i"}, "hello", []string{"cat"}, 0, "hello", ""},
		"passes_no_input_without_i":     {nil, "hello", []string{"cat"}, 0, "", ""},
		"passes_variables_and_a_folder": {[]string{"-env=A=b=c", "-dir=/proc"}, "", []string{"sh", "-c", "echo $A; pwd"}, 0, "b=c\n/proc\n", ""},
		"returns_the_code_of_a_signal":  {nil, "", []string{"sh", "-c", "kill -9 $$"}, 137, "", ""},
		"returns_large_codes":           {nil, "", []string{"sh", "-c", "exit 255"}, 255, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := s.exec(t, tc.options, tc.command...)
			var stdout, stderr bytes.Buffer
			cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(tc.stdin), &stdout, &stderr
			_ = cmd.Run() // the code says it
			must.Eq(t, tc.code, cmd.ProcessState.ExitCode(), must.Sprint(stderr.String()))
			must.Eq(t, tc.stdout, stdout.String())
			must.Eq(t, tc.stderr, stderr.String())
		})
	}

	t.Run("returns_125_for_its_own_errors", func(t *testing.T) {
		for want, cmd := range map[string]*exec.Cmd{
			"no session":          s.bivouac(t.Context(), "session", "exec", uuid.NewString(), "--", "true"),
			"there is no program": s.exec(t, nil, "no-such-program"),
			"COMMAND is missing":  s.bivouac(t.Context(), "session", "exec", uuid.NewString()),
			"greater than 0":      s.exec(t, []string{"-timeout=-1s"}, "true"),
			"is not a UUID":       s.bivouac(t.Context(), "session", "exec", "x", "true"),
			"needs a terminal":    s.exec(t, []string{"-it"}, "true"),
		} {
			output, _ := cmd.CombinedOutput() // the code says it
			must.Eq(t, 125, cmd.ProcessState.ExitCode(), must.Sprint(string(output)))
			must.StrContains(t, string(output), want)
		}
	})

	t.Run("kills_the_command_when_its_time_is_over", func(t *testing.T) {
		marker := exectest.NewMarker()
		cmd := s.exec(t, []string{"-timeout=1s"}, "sleep", marker)
		_ = cmd.Run() // the code says it
		must.Eq(t, 124, cmd.ProcessState.ExitCode())
		exectest.AwaitGone(t, marker)
	})

	t.Run("kills_the_command_on_a_signal", func(t *testing.T) {
		marker := exectest.NewMarker()
		cmd := s.exec(t, nil, "sh", "-c", exectest.Family, "sh", marker)
		must.NoError(t, cmd.Start())
		exectest.AwaitRunning(t, marker, 3)
		must.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		_ = cmd.Wait() // the code says it
		must.Eq(t, 143, cmd.ProcessState.ExitCode())
		exectest.AwaitGone(t, marker)
	})
}

func TestSessionExecOnATerminal(t *testing.T) {
	stack.NeedServers(t) // it takes a while
	s := startDev(t)

	t.Run("passes_keys_and_sizes_and_is_restored", func(t *testing.T) {
		p := openPTY(t, 33, 101)
		before := p.settings(t)
		cmd := p.start(t, s.exec(t, []string{"-it"}, "sh"))
		p.typeLine(t, "stty size; echo T=$TERM")
		p.await(t, "33 101\r\nT=dumb\r\n")
		p.resize(t, 44, 102)
		p.typeLine(t, `until [ "$(stty size)" = "44 102" ]; do sleep 0.1; done; echo "now $(stty size)"`)
		p.await(t, "now 44 102\r\n")
		p.typeLine(t, "sleep 1000")
		p.await(t, "sleep 1000")
		must.NotEq(t, before, p.settings(t)) // it is raw
		_, err := p.ours.Write([]byte{3})    // Ctrl-C is for the command
		must.NoError(t, err)
		p.typeLine(t, "exit 7")
		_ = cmd.Wait() // the code says it
		must.Eq(t, 7, cmd.ProcessState.ExitCode())
		must.Eq(t, before, p.settings(t))
	})

	t.Run("is_restored_after_a_signal", func(t *testing.T) {
		p := openPTY(t, 24, 80)
		before, marker := p.settings(t), exectest.NewMarker()
		cmd := p.start(t, s.exec(t, []string{"-it"}, "sleep", marker))
		exectest.AwaitRunning(t, marker, 1)
		must.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		_ = cmd.Wait() // the code says it
		must.Eq(t, 143, cmd.ProcessState.ExitCode())
		must.Eq(t, before, p.settings(t))
		exectest.AwaitGone(t, marker)
	})

	t.Run("is_restored_when_the_server_is_killed", func(t *testing.T) {
		p := openPTY(t, 24, 80)
		before, marker := p.settings(t), exectest.NewMarker()
		cmd := p.start(t, s.exec(t, []string{"-it"}, "sleep", marker))
		exectest.AwaitRunning(t, marker, 1)
		must.NoError(t, s.Process.Kill())
		_ = cmd.Wait() // the code says it
		must.Eq(t, 125, cmd.ProcessState.ExitCode())
		must.Eq(t, before, p.settings(t))
		exectest.AwaitGone(t, marker)
	})
}

// pty is a terminal as a person has it.
type pty struct {
	ours, theirs *os.File

	mu     sync.Mutex
	screen string
}

func openPTY(t *testing.T, rows, columns uint16) *pty {
	t.Helper()
	ours, theirs, err := tty.Open()
	must.NoError(t, err)
	p := &pty{ours: ours, theirs: theirs}
	p.resize(t, rows, columns)
	var reading sync.WaitGroup
	reading.Go(func() { _, _ = io.Copy(p, ours) }) // until it is closed
	t.Cleanup(func() {
		must.NoError(t, errors.Join(p.theirs.Close(), ours.Close()))
		reading.Wait()
	})
	return p
}

func (p *pty) resize(t *testing.T, rows, columns uint16) {
	t.Helper()
	must.NoError(t, tty.Resize(p.ours, runtime.WindowSize{Rows: rows, Columns: columns}))
}

func (p *pty) settings(t *testing.T) (settings unix.Termios) {
	t.Helper()
	must.NoError(t, tty.Control(p.theirs, func(fd int) error {
		got, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err == nil {
			settings = *got
		}
		return err
	}))
	return settings
}

// start starts a program on the terminal.
func (p *pty) start(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.theirs, p.theirs, p.theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	must.NoError(t, cmd.Start())
	return cmd
}

func (p *pty) typeLine(t *testing.T, text string) {
	t.Helper()
	_, err := p.ours.WriteString(text + "\r")
	must.NoError(t, err)
}

// Write adds to the screen.
func (p *pty) Write(text []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.screen += string(text)
	return len(text), nil
}

// await waits for text on the screen, and takes it and all before it.
func (p *pty) await(t *testing.T, text string) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Timeout(exectest.Patience), wait.Gap(5*time.Millisecond), wait.ErrorFunc(func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		_, rest, ok := strings.Cut(p.screen, text)
		if !ok {
			return fmt.Errorf("there is no %q in %q", text, p.screen)
		}
		p.screen = rest
		return nil
	})))
}
