package process

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// sandbox is the driver's state of one sandbox.
type sandbox struct {
	spec runtime.Spec // as created; never changes, like port and logs
	port uint16
	logs map[runtime.LogStream]*log

	creating chan struct{}   // holds a token while a Create works on it
	running  context.Context // done once nothing of the sandbox runs
	end      context.CancelFunc

	mu      sync.Mutex
	leader  leader // zero until it is started
	ready   bool
	stopped bool // Stop or Delete was called
	ended   bool // nothing of it runs
	reason  string
	claim   *runtime.Spec // of a spare that a chat has; nil until its volume is there

	happened []runtime.Happening // oldest first, a handful
	// signalled are the processes that were asked to end. If the parent of one of them
	// ends first, members may no longer find it.
	signalled []member
}

func newSandbox(spec runtime.Spec, port uint16) *sandbox {
	running, end := context.WithCancel(context.Background())
	return &sandbox{spec: spec, port: port, logs: newLogs(spec.SessionID), creating: make(chan struct{}, 1), running: running, end: end}
}

func (sb *sandbox) endpoint() runtime.Endpoint {
	return runtime.Endpoint{IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: sb.port}
}

func (sb *sandbox) view() runtime.Sandbox {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	spec := sb.spec
	if sb.claim != nil {
		spec = *sb.claim
	}
	view := runtime.Sandbox{
		SessionID: spec.SessionID,
		ChatID:    spec.ChatID,
		Endpoint:  sb.endpoint(),
		State:     runtime.StateStarting,

		AgentID:        spec.AgentID,
		VolumeHostPath: spec.VolumeHostPath,
		CreatedAt:      spec.CreatedAt,
		ExpiresAt:      spec.ExpiresAt,
		Pool:           sb.spec.Pool,
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
	words := sb.spec.AccessToken.HideIn(d.lastWords(context.Background(), sb))
	sb.mu.Lock()
	sb.note("ended: %s", reason)
	if words != "" {
		sb.note("the last line of its output: %s", words)
	}
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
