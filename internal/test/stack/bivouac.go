package stack

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/api/apiclient"
)

// The limits of waiting for a Bivouac server.
const (
	bivouacStartLimit = 3 * time.Minute  // it waits for Nomad and Consul
	bivouacStopLimit  = 45 * time.Second // the server's own limit
	bivouacStopSlack  = 10 * time.Second
)

// Bivouac is a Bivouac server in a process of its own.
type Bivouac struct{ *Agent }

// NewBivouac returns a server that is not started yet. It runs the program bin with the
// environment env, listens on addr, and appends its output to the file log.
func NewBivouac(name, bin, addr, log string, env []string, flags ...string) (*Bivouac, error) {
	api, err := apiclient.New(addr, nil)
	if err != nil {
		return nil, err
	}
	return &Bivouac{&Agent{
		Name: name, Addr: addr, Log: log, Env: env,
		bin: bin, args: append([]string{"agent", "-http-addr=" + addr}, flags...), limit: bivouacStartLimit,
		ready: func(ctx context.Context) error {
			_, err := api.Health(ctx)
			return err
		},
	}}, nil
}

// Stop asks the server to end (SIGTERM), and kills it if it does not within 55 s. It
// returns an error then, and if the server fails within 45 s. After that time it may say
// that it could not finish what it had begun, because Consul or Nomad is down.
func (b *Bivouac) Stop() error {
	if !b.Running() {
		return nil
	}
	began := time.Now()
	if err := errors.Join(b.Signal(syscall.SIGTERM), b.Resume()); err != nil && b.Running() {
		return err
	}
	select {
	case <-b.Done():
		if took := time.Since(began); b.ExitCode() != 0 && took < bivouacStopLimit {
			return fmt.Errorf("stack: %s was asked to stop, and ended after %s with code %d:\n%s",
				b.Name, took.Round(time.Millisecond), b.ExitCode(), tail(b.Log))
		}
		return nil
	case <-time.After(bivouacStopLimit + bivouacStopSlack):
		return errors.Join(fmt.Errorf("stack: %s did not end within %s of SIGTERM", b.Name, bivouacStopLimit+bivouacStopSlack), b.Kill())
	}
}
