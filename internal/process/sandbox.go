package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

// sandbox is what the driver holds of one.
type sandbox struct {
	creating chan struct{}   // holds a token while a Create is at work on it
	running  context.Context // ends once nothing of the sandbox runs
	end      context.CancelFunc
	adopted  bool // started by an earlier driver, so it is no child of ours; never changes

	mu     sync.Mutex
	record record
}

func newSandbox(r record) *sandbox {
	running, end := context.WithCancel(context.Background())
	return &sandbox{creating: make(chan struct{}, 1), running: running, end: end, record: r}
}

func (sb *sandbox) view() runtime.Sandbox {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.record.view()
}

// signal sends sig to all processes of the sandbox. The caller holds sb.mu.
func (d *Driver) signal(sb *sandbox, sig syscall.Signal) {
	if !sb.record.Ended && sb.record.PID != 0 {
		signal(d.members(sb.record), sig)
	}
}

// ended notes that nothing of the sandbox runs any more, and why.
func (d *Driver) ended(sb *sandbox, reason string) {
	sb.mu.Lock()
	if sb.record.Stopped {
		reason = "stopped"
	}
	sb.record.Ended, sb.record.Reason = true, reason
	r := sb.record
	// A driver that was closed has lost its say over the folder.
	if !d.closed.Load() {
		if err := d.save(r); err != nil {
			// The next driver sees for itself that the process is gone.
			d.log.Warn("sandbox_record_failed", "session_id", r.Spec.SessionID, "error", err)
		}
	}
	sb.mu.Unlock()
	sb.end()
	d.notify(r.Spec.SessionID)
}

// reap waits until the process that leads the sandbox ends, and then ends what
// is left of the sandbox: it is as long as its leader.
func (d *Driver) reap(sb *sandbox, cmd *exec.Cmd) {
	awaitExit(cmd)
	pid := cmd.Process.Pid
	mark := d.mark(sb.view().SessionID)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		left := members(pid, true, mark)
		if len(left) == 0 {
			break
		}
		_ = syscall.Kill(-pid, syscall.SIGKILL) // all of the group at once, however fast it forks; it fails where it is empty
		signal(left, syscall.SIGKILL)
		<-time.After(pause)
	}
	_ = cmd.Wait() // how it ended is in its state
	d.ended(sb, exitReason(cmd.ProcessState))
}

func exitReason(state *os.ProcessState) string {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return "killed by signal " + strconv.Itoa(int(status.Signal()))
	}
	return "exit code " + strconv.Itoa(state.ExitCode())
}

const (
	adoptedEvery = 200 * time.Millisecond // how soon the end of an adopted sandbox is seen
	logEvery     = 5 * time.Second        // how often logs are cut
	maxLog       = 1 << 20                // bytes that a log may have when it is looked at
)

// tend looks after what nobody else notices: sandboxes that are not children of
// this process, and logs that grow.
func (d *Driver) tend() {
	adopted := time.NewTicker(adoptedEvery)
	defer adopted.Stop()
	logs := time.NewTicker(logEvery)
	defer logs.Stop()
	for {
		select {
		case <-d.closing:
			return
		case <-adopted.C:
			for _, sb := range d.snapshot() {
				d.tendAdopted(sb)
			}
		case <-logs.C:
			for _, sb := range d.snapshot() {
				d.cutLog(sb.view().SessionID)
			}
		}
	}
}

// tendAdopted sees whether an adopted sandbox has ended.
func (d *Driver) tendAdopted(sb *sandbox) {
	if !sb.adopted || sb.running.Err() != nil {
		return
	}
	sb.mu.Lock()
	r := sb.record
	sb.mu.Unlock()
	if start, ok := startOf(r.PID); ok && start == r.Start {
		return
	}
	if left := d.members(r); len(left) > 0 {
		signal(left, syscall.SIGKILL) // that they are gone is seen at the next look
		return
	}
	d.ended(sb, "it ended after the agent that started it; its exit status is unknown")
}

// cutLog empties a log that grew too long. The sandbox appends, so it goes on at
// the beginning.
func (d *Driver) cutLog(sessionID string) {
	log, err := d.folder.OpenFile(sessionID+logExt, os.O_WRONLY, 0)
	if err != nil {
		return // it was deleted meanwhile
	}
	info, err := log.Stat()
	if err == nil && info.Size() > maxLog {
		err = log.Truncate(0)
	}
	if err = errors.Join(err, log.Close()); err != nil {
		d.log.Warn("sandbox_log_not_cut", "session_id", sessionID, "error", err)
	}
}

// lastWords is the last line of the sandbox's log, for an error message. It is
// empty where there is none.
func (d *Driver) lastWords(sessionID string) string {
	text, err := d.folder.ReadFile(sessionID + logExt)
	if err != nil {
		return ""
	}
	text = text[max(0, len(text)-500):]
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(text), "")), "\n")
	return lines[len(lines)-1]
}
