package nomad

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/runtime"
)

// guardScript guards a command. The driver runs it beside the command and sends it a line
// every half second. If there is none for five seconds, or on the line "kill", the script
// kills every process that has the mark in its environment, until there is none. On the
// line "done PID" it kills only that process. On the line "go PID" it lets that wrapper begin
// its command. So a command whose connection was lost before never begins.
//
// A broken connection does not end the input of a process in a Nomad task. So the script
// needs a read with a time limit: that of the shell, or else that of its terminal. The
// terminal echoes the words that it gets, so its answers are other words.
//
// The script is a child of the process that Nomad started. When a task of raw_exec ends,
// Nomad kills that process, but not always the children of the command.
const guardScript = `trap "" HUP
guard() {
for tool in env grep sleep; do command -v $tool >/dev/null || { echo "$tool: not found"; exit 1; }; done
[ -r /proc/self/environ ] || { echo "it has no /proc"; exit 1; }
limit="-t 5"
if ! (read -r $limit line </dev/null || [ $? = 1 ]) 2>/dev/null; then
limit=
stty -icanon -echo min 0 time 50 || exit 1
fi
echo "ready $$"
while read -r $limit word pid; do
case $word in
go) kill -USR1 "$pid" ;;
done) kill -9 "$pid" 2>/dev/null; echo bye; exit ;;
kill) break ;;
esac
echo alive
done
tries=0
while found=$(grep -ls "$1" /proc/[0-9]*/environ); [ -n "$found" ]; do
for file in $found; do
file=${file#/proc/}
kill -9 "${file%/environ}" 2>/dev/null
done
tries=$((tries + 1))
[ $tries -lt 60 ] || exit 1
[ $tries -lt 5 ] || sleep 1
done
echo killed
}
exec 3<&0
guard "$1" <&3 &
wait $!`

// The words for a guard, and its answers.
const (
	wordBeat = "beat"
	wordGo   = "go" // and the PID of the wrapper
	wordDone = "done"
	wordKill = "kill"

	answerReady  = "ready " // and its PID
	answerBye    = "bye"
	answerKilled = "killed"
)

const (
	beatEvery = 500 * time.Millisecond
	// maxGuardSilence is how long a guard may be silent. Its connection is then taken for
	// dead.
	maxGuardSilence = 10 * time.Second
	// maxGuardLine bounds what is kept of a line of a guard, in bytes.
	maxGuardLine = 4096
)

var errGuardLost = errors.New("the connection to the command's guard is lost, so the guard kills the command")

// execGuard is a running guardScript.
type execGuard struct {
	conn *execConn
	pid  string        // of the guard
	mark string        // the variable in the environment of what it kills
	gone chan struct{} // closed once the guard has ended or its connection is lost

	wrapper string // PID of the command's wrapper, once it is known

	opened  time.Time
	heard   atomic.Int64 // when the guard answered last, in ns after it was opened
	cancel  context.CancelFunc
	workers sync.WaitGroup
	rest    string // a line that is not complete
}

// openGuard starts a guard and waits until it is ready.
func (d *Driver) openGuard(ctx context.Context, task task) (*execGuard, error) {
	mark := markName + "=" + rand.Text()
	var opened *execGuard
	err := d.whileBusy(ctx, limits{"exec", nil, tellLimit}, func(ctx context.Context, token string) error {
		conn, err := d.dialExec(ctx, task, []string{"sh", "-c", guardScript, "sh", mark}, true, token)
		if err != nil {
			return err
		}
		g := &execGuard{conn: conn, mark: mark, gone: make(chan struct{}), opened: time.Now()}
		if err := g.awaitReady(ctx); err != nil {
			conn.close()
			return err
		}
		opened = g
		return nil
	})
	if err != nil {
		return nil, err
	}
	// It lasts until finish, which begins when the caller's ctx has ended.
	ctx, opened.cancel = context.WithCancel(context.WithoutCancel(ctx))
	opened.heard.Store(int64(time.Since(opened.opened)))
	opened.workers.Go(func() { opened.listen(ctx) })
	opened.workers.Go(func() { opened.beat(ctx) })
	return opened, nil
}

// awaitReady reads the first line of the guard.
func (g *execGuard) awaitReady(ctx context.Context) error {
	var said []string
	length := 0
	for {
		lines, exit, err := g.read(ctx)
		if err != nil {
			return err
		}
		for _, line := range lines {
			if pid, ok := strings.CutPrefix(line, answerReady); ok {
				g.pid = pid
				return nil
			}
			said = append(said, line)
			length += len(line)
		}
		switch {
		case length > maxGuardLine:
			return fmt.Errorf("%w: the sandbox's sh prints something else than the script that guards commands", runtime.ErrInvalid)
		case exit == nil:
		case exit.ExitCode == 0:
			// A guard that cannot work ends with an error. With docker Nomad sometimes
			// reports this of a process that runs; that guard ends by itself, because it
			// gets no lines.
			return fmt.Errorf("%w: the guard ended before it was ready", errNotStarted)
		default:
			return fmt.Errorf("%w: the sandbox needs sh, env, grep and sleep (and stty, if its sh has no read -t) to run commands: %s",
				runtime.ErrInvalid, strings.Join(append(said, g.rest), " "))
		}
	}
}

// read returns the next complete lines, and how the guard has ended if it has.
func (g *execGuard) read(ctx context.Context) (lines []string, exit *api.ExecStreamingExitResult, err error) {
	out, err := g.conn.receive(ctx)
	if err != nil {
		return nil, nil, err
	}
	g.rest += string(dataOf(out.Stdout)) + string(dataOf(out.Stderr))
	for {
		line, rest, ok := strings.Cut(g.rest, "\n")
		if !ok {
			break
		}
		lines, g.rest = append(lines, strings.TrimRight(line, "\r")), rest
	}
	g.rest = g.rest[:min(len(g.rest), maxGuardLine)]
	if out.Exited {
		exit = cmp.Or(out.Result, &api.ExecStreamingExitResult{})
	}
	return lines, exit, nil
}

// listen reads what the guard says until it ends.
func (g *execGuard) listen(ctx context.Context) {
	defer close(g.gone)
	for {
		lines, exit, err := g.read(ctx)
		if err != nil || exit != nil {
			return
		}
		g.heard.Store(int64(time.Since(g.opened)))
		for _, line := range lines {
			if line == answerBye || line == answerKilled {
				return
			}
		}
	}
}

// beat tells the guard that this process lives, until ctx ends or the guard is silent for
// too long.
func (g *execGuard) beat(ctx context.Context) {
	beats := time.NewTicker(beatEvery)
	defer beats.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-beats.C:
		}
		silent := time.Since(g.opened) - time.Duration(g.heard.Load())
		if silent > maxGuardSilence || g.say(ctx, wordBeat) != nil {
			g.cancel() // which ends listen
			return
		}
	}
}

func (g *execGuard) say(ctx context.Context, word string) error {
	return g.conn.send(ctx, api.ExecStreamingInput{Stdin: &api.ExecStreamingIOOperation{Data: []byte(word + "\n")}})
}

// finish says the last word to the guard, and waits until it is done or limit is over.
func (g *execGuard) finish(word string, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if g.say(ctx, word+" "+g.wrapper) == nil {
		select {
		case <-g.gone:
		case <-ctx.Done():
		}
	}
	g.cancel()
	g.workers.Wait()
	g.conn.close()
}
