package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// group is a set of agents that start and stop together, and what they share.
type group struct {
	dir   string // short, because it contains Unix sockets, whose paths have at most 107 bytes
	ports *portBlock
	all   []*Agent
	once  sync.Once // Stop may be called by a test and by its cleanup
}

func newGroup() (*group, error) {
	dir, err := os.MkdirTemp("", "bivouac-")
	if err != nil {
		return nil, err
	}
	ports, err := newPortBlock()
	if err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	return &group{dir: dir, ports: ports}, nil
}

// env returns the environment of the group's agents. It leaves out variables that point to
// the user's own Nomad or Consul. Everything that an agent starts inherits the mark, by
// which [sweep] finds it.
func (g *group) env() []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "NOMAD_") || strings.HasPrefix(kv, "CONSUL_")
	})
	return append(env, markName+"="+g.dir, "TMPDIR="+g.dir)
}

// node returns the name of an agent's node. No other group on this machine has it, so that
// an answer of another group's agent is not taken for this one's.
func (g *group) node(agent string) string { return filepath.Base(g.dir) + "-" + agent }

// add makes an agent with its own directory. prepare writes its configuration there and
// returns its arguments.
func (g *group) add(name, bin string, addr string, prepare func(dir string) ([]string, error)) (*Agent, error) {
	dir := filepath.Join(g.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	args, err := prepare(dir)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		Name:  name,
		Addr:  addr,
		Log:   filepath.Join(dir, "agent.log"),
		Env:   g.env(),
		bin:   bin,
		args:  args,
		limit: startLimit,
	}
	g.all = append(g.all, a)
	return a, nil
}

// stop stops all agents, calls the given function, and then removes everything that the
// agents ever started and the group's directory. A second call does nothing.
func (g *group) stop(then ...func() error) (err error) {
	g.once.Do(func() { err = g.stopNow(then) })
	return err
}

func (g *group) stopNow(then []func() error) error {
	errs := make([]error, len(g.all))
	var wg sync.WaitGroup
	for i, a := range g.all {
		wg.Go(func() { errs[i] = a.Stop() })
	}
	wg.Wait()
	for _, f := range then {
		errs = append(errs, f())
	}
	return errors.Join(append(errs, sweep(g.dir), g.ports.release())...)
}

// reload asks all running agents to read their configuration and certificates again.
func (g *group) reload() error {
	for _, a := range g.all {
		if !a.Running() {
			continue
		}
		if err := a.Signal(syscall.SIGHUP); err != nil {
			return err
		}
	}
	return nil
}

// start starts agents and waits until all are ready. It only waits for an agent that is
// already running.
func start(ctx context.Context, agents []*Agent) error {
	for _, a := range agents {
		if a.Running() {
			continue
		}
		if err := a.Start(); err != nil {
			return err
		}
	}
	for _, a := range agents {
		if err := a.WaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// leader finds the leader. ask returns the RPC address of the leader that one server knows.
func leader(servers []*Agent, ask func(*Agent) (string, error)) (*Agent, error) {
	err := errors.New("no server runs")
	for _, a := range servers {
		if !a.Running() {
			continue
		}
		var addr string
		if addr, err = ask(a); err != nil {
			continue
		}
		i := slices.IndexFunc(servers, func(s *Agent) bool { return s.rpc == addr && s.Running() })
		if i >= 0 {
			return servers[i], nil
		}
		err = fmt.Errorf("%s knows of no running leader", a.Name)
	}
	return nil, fmt.Errorf("stack: find the leader: %w", err)
}
