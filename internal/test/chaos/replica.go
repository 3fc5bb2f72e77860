package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// replica is one Bivouac server process that can be killed and started again.
type replica struct {
	*stack.Bivouac
	name   string
	api    *apiclient.Client
	token  string // of all callers
	consul *proxy
	nomad  *proxy
	busy   atomic.Int32 // requests in progress that change something

	clock time.Duration // how far the machine's clock is ahead, from the next start on
	env   []string

	pools   *pools  // nil: it has none
	pooling pooling // what it was last started with
	file    string  // that has it
}

func newReplica(dir, name, binary string, consul, nomad *proxy, flags []string) (*replica, error) {
	port, err := replicaPort()
	if err != nil {
		return nil, err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	api, err := apiclient.New(addr, identified{&http.Transport{MaxIdleConnsPerHost: 64}})
	if err != nil {
		return nil, err
	}
	// Callers must authenticate, as in production.
	callers := filepath.Join(dir, name+".hcl")
	token, err := stack.WriteCallers(callers, "agent-")
	if err != nil {
		return nil, err
	}
	server, err := stack.NewBivouac(name, binary, addr, filepath.Join(dir, name+".log"), nil, append(flags, "-config="+callers)...)
	return &replica{
		Bivouac: server, name: name, api: api.WithToken(token), token: token, consul: consul, nomad: nomad,
		env: append(os.Environ(), "CONSUL_HTTP_ADDR="+consul.Addr(), "NOMAD_ADDR=http://"+nomad.Addr()),
	}, err
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
func (r *replica) start(ctx context.Context) (err error) {
	if r.pools != nil {
		if r.pooling, err = r.pools.write(r.file); err != nil {
			return err
		}
	}
	r.Env = append(slices.Clone(r.env), "BIVOUAC_CLOCK_OFFSET="+r.clock.String())
	if err := r.Start(); err != nil {
		return err
	}
	return r.WaitReady(ctx)
}

// restart asks the process to stop, and starts it again.
func (r *replica) restart(ctx context.Context, log *timeline) error {
	if err := r.Stop(); err != nil {
		log.violation(wrong, r.name, "%v", err)
	}
	return r.start(ctx)
}

func (r *replica) close() error {
	err := r.Stop()
	r.consul.stop()
	r.nomad.stop()
	return err
}
