package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// replica is one Bivouac server process that can be killed and started again.
type replica struct {
	name   string
	api    *apiclient.Client
	consul *proxy
	nomad  *proxy
	busy   atomic.Int32 // requests in progress that change something

	clock  time.Duration // how far the machine's clock is ahead, from the next start on
	binary string
	args   []string
	env    []string
	log    *os.File

	cmd  *exec.Cmd
	done chan struct{} // closed when the process is gone
}

// These are the limits of waiting for a replica.
const (
	readyLimit = 3 * time.Minute
	stopLimit  = 45 * time.Second // the server's own limit
	stopSlack  = 10 * time.Second
)

func newReplica(dir, name, binary string, consul, nomad *proxy, flags []string) (*replica, error) {
	port, err := replicaPort()
	if err != nil {
		return nil, err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	api, err := apiclient.New(addr, &http.Transport{MaxIdleConnsPerHost: 64})
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, err
	}
	return &replica{
		name: name, api: api, consul: consul, nomad: nomad, binary: binary, log: log,
		args: append([]string{"agent", "-http-addr=" + addr}, flags...),
		env:  append(os.Environ(), "CONSUL_HTTP_ADDR="+consul.addr, "NOMAD_ADDR=http://"+nomad.addr),
	}, nil
}

// Replicas listen below the ephemeral ports and the ports of package stack's
// agents, so that a replica that is down finds its port free when it starts
// again.
const (
	firstPort = 4800
	lastPort  = 9800
)

var portsTaken atomic.Int32 // by this process

// replicaPort returns a free port that no other replica of this process has.
func replicaPort() (int, error) {
	start := os.Getpid() * 64
	for range lastPort - firstPort {
		port := firstPort + (start+int(portsTaken.Add(1)))%(lastPort-firstPort)
		if free, err := stack.FreePort(port); err == nil && free == port {
			return port, nil
		}
	}
	return 0, errors.New("no port is free for a replica")
}

// start starts the process and waits until it reports that it is ready.
func (r *replica) start(ctx context.Context, more ...string) error {
	cmd := exec.Command(r.binary, r.args...)
	cmd.Env = append(slices.Concat(r.env, more), "BIVOUAC_CLOCK_OFFSET="+r.clock.String())
	cmd.Stdout, cmd.Stderr = r.log, r.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error), make(chan struct{})
	go func() {
		defer close(done)
		// Pdeathsig refers to the thread that starts the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // the process state holds the result
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", r.name, err)
	}
	r.cmd, r.done = cmd, done
	return r.ready(ctx)
}

// errEnded means that a replica ended although nothing ended it.
var errEnded = errors.New("it ended by itself")

// ready waits until the replica reports that it is ready.
func (r *replica) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	for {
		try, cancelTry := context.WithTimeout(ctx, 2*time.Second)
		_, err := r.api.Health(try)
		cancelTry()
		select {
		case <-r.done: // any answer came from another process
			return fmt.Errorf("%s: %w: %s\n%s", r.name, errEnded, r.cmd.ProcessState, r.lastWords())
		default:
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %w", r.name, ctx.Err(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// lastWords returns the end of the replica's log.
func (r *replica) lastWords() string {
	text, err := os.ReadFile(r.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-2000):])
}

func (r *replica) signal(sig syscall.Signal) error {
	if err := r.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("send %v to %s: %w", sig, r.name, err)
	}
	return nil
}

// kill ends the process at once.
func (r *replica) kill() error {
	if err := r.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-r.done
	return nil
}

// stop asks the process to end and kills it if it does not end in time. It
// returns an error if the process failed before its own stop limit. While
// Consul or Nomad is down, the process may be unable to finish what it has
// begun; it must then report that at the end of its limit.
func (r *replica) stop() error {
	began := time.Now()
	if err := r.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-r.done:
		if took := time.Since(began); !r.cmd.ProcessState.Success() && took < stopLimit {
			return fmt.Errorf("%s was told to stop, and ended after %s with %s:\n%s",
				r.name, took.Round(time.Millisecond), r.cmd.ProcessState, r.lastWords())
		}
		return nil
	case <-time.After(stopLimit + stopSlack):
		return errors.Join(fmt.Errorf("%s did not end within %s of SIGTERM", r.name, stopLimit+stopSlack), r.kill())
	}
}

func (r *replica) close() error {
	var err error
	if r.cmd != nil {
		select {
		case <-r.done:
		default:
			err = errors.Join(r.signal(syscall.SIGCONT), r.stop())
		}
	}
	r.consul.stop()
	r.nomad.stop()
	return errors.Join(err, r.log.Close())
}
