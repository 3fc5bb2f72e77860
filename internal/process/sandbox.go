package process

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// sandbox is the driver's state of one sandbox.
type sandbox struct {
	spec runtime.Spec // never changes, like port
	port uint16

	creating chan struct{}   // holds a token while a Create works on it
	running  context.Context // done once nothing of the sandbox runs
	end      context.CancelFunc

	mu      sync.Mutex
	leader  leader // zero until it is started
	ready   bool
	stopped bool // Stop or Delete was called
	ended   bool // nothing of it runs
	reason  string
	// signalled are the processes that were asked to end. If the parent of one of them
	// ends first, members may no longer find it.
	signalled []member
}

func newSandbox(spec runtime.Spec, port uint16) *sandbox {
	running, end := context.WithCancel(context.Background())
	return &sandbox{spec: spec, port: port, creating: make(chan struct{}, 1), running: running, end: end}
}

func (sb *sandbox) endpoint() runtime.Endpoint {
	return runtime.Endpoint{IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: sb.port}
}

func (sb *sandbox) view() runtime.Sandbox {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	view := runtime.Sandbox{
		SessionID: sb.spec.SessionID,
		ChatID:    sb.spec.ChatID,
		Endpoint:  sb.endpoint(),
		State:     runtime.StateStarting,

		AgentID:        sb.spec.AgentID,
		VolumeHostPath: sb.spec.VolumeHostPath,
		CreatedAt:      sb.spec.CreatedAt,
		ExpiresAt:      sb.spec.ExpiresAt,
	}
	if sb.leader.PID != 0 {
		view.ContainerID = strconv.Itoa(sb.leader.PID)
	}
	switch {
	case sb.ended:
		view.State, view.Reason = runtime.StateDead, sb.reason
	case sb.ready:
		view.State = runtime.StateRunning
	}
	return view
}

// signal sends sig to all processes of the sandbox. The caller must hold sb.mu.
func (d *Driver) signal(sb *sandbox, sig syscall.Signal) {
	if !sb.ended && sb.leader.PID != 0 {
		found := sb.leader.members(mark(d.dir, sb.spec.SessionID))
		sb.signalled = append(sb.signalled, found...)
		signal(found, sig)
	}
}

// stillRunning returns the processes that were signalled and have not ended.
func (sb *sandbox) stillRunning() []member {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(sb.signalled), func(m member) bool {
		s, runs := statOf(m.pid)
		return !runs || s.start != m.start
	})
}

// ended records that nothing of the sandbox runs any more, and why.
func (d *Driver) ended(sb *sandbox, reason string) {
	sb.mu.Lock()
	if sb.stopped {
		reason = "stopped"
	}
	sb.ended, sb.reason = true, reason
	sb.mu.Unlock()
	if err := remove(d.folder, sb.spec.SessionID+recordExt); err != nil && !d.closed.Load() {
		// EndLeftovers will find that the process is gone.
		d.log.Warn("sandbox_record_failed", "session_id", sb.spec.SessionID, "error", err)
	}
	sb.end()
	d.notify(sb.spec.SessionID)
}

// reap waits until the sandbox's leader ends and then kills what is left of the
// sandbox: a sandbox lives as long as its leader.
func (d *Driver) reap(sb *sandbox, cmd *exec.Cmd) {
	awaitExit(cmd)
	pid := cmd.Process.Pid
	mark := mark(d.dir, sb.spec.SessionID)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		left := append(members(pid, true, mark), sb.stillRunning()...)
		if len(left) == 0 {
			break
		}
		_ = syscall.Kill(-pid, syscall.SIGKILL) // the whole group at once, however fast it forks; fails if it is empty
		signal(left, syscall.SIGKILL)
		<-time.After(pause)
	}
	_ = cmd.Wait() // the result is in cmd.ProcessState
	d.ended(sb, exitReason(cmd.ProcessState))
}

func exitReason(state *os.ProcessState) string {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return "killed by signal " + strconv.Itoa(int(status.Signal()))
	}
	return "exit code " + strconv.Itoa(state.ExitCode())
}

const (
	logEvery = 5 * time.Second // how often logs are cut
	maxLog   = 1 << 20         // bytes; a log that is longer when checked is emptied
)

// cutLogs empties logs that are too long, until the driver is closed.
func (d *Driver) cutLogs() {
	look := time.NewTicker(logEvery)
	defer look.Stop()
	for {
		select {
		case <-d.closing:
			return
		case <-look.C:
			for _, sb := range d.snapshot() {
				d.cutLog(sb.spec.SessionID)
			}
		}
	}
}

// cutLog empties a log that is too long. The sandbox opened it for appending, so it
// continues at the beginning.
func (d *Driver) cutLog(sessionID string) {
	log, err := d.folder.OpenFile(sessionID+logExt, os.O_WRONLY, 0)
	if err != nil {
		return // it was deleted in the meantime
	}
	info, err := log.Stat()
	if err == nil && info.Size() > maxLog {
		err = log.Truncate(0)
	}
	if err = errors.Join(err, log.Close()); err != nil {
		d.log.Warn("sandbox_log_not_cut", "session_id", sessionID, "error", err)
	}
}

// lastWords returns the last line of the sandbox's log for an error message, or "" if
// there is none.
func (d *Driver) lastWords(sessionID string) string {
	text, err := d.folder.ReadFile(sessionID + logExt)
	if err != nil {
		return ""
	}
	text = text[max(0, len(text)-500):]
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(text), "")), "\n")
	return lines[len(lines)-1]
}
