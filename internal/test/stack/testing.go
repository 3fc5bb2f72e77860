package stack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
)

// Main runs a package's tests, and then stops what [ConsulForTest] and [NomadForTest]
// started for them. TestMain calls it:
//
//	func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }
func Main(m *testing.M) int {
	code := m.Run()
	if code != 0 {
		shared.showLogs()
	}
	if err := shared.stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}

// NeedServers skips the test in short mode (go test -short). In short mode no
// server is started, built or needed. Call it before [StartConsul],
// [StartNomad] or a docker command.
func NeedServers(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs real servers, which are not used with -short; make test-all runs it")
	}
}

// ConsulForTest returns the dev agent that the tests of this process share, and
// a KV prefix, ending in "/", that only this test uses. The first caller starts
// the agent. In short mode it skips the test.
func ConsulForTest(t testing.TB) (c *Consul, prefix string) {
	t.Helper()
	NeedServers(t)
	c, err := shared.consul()
	if err != nil {
		t.Fatal(err)
	}
	return c, "test-" + rand.Text() + "/"
}

// NomadForTest returns the dev agent that the tests of this process share. The
// first caller starts it. Tests tell their jobs apart by their IDs; what they
// leave running is stopped in the end. In short mode it skips the test.
func NomadForTest(t testing.TB) *Nomad {
	t.Helper()
	NeedServers(t)
	n, err := shared.nomad()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// DockerForTest returns the name of an image that runs "bivouac demo-sandbox".
// If no Docker engine answers, it skips the test; in CI, which has an engine,
// it fails the test. In short mode it skips the test.
func DockerForTest(t testing.TB) (image string) {
	t.Helper()
	needDocker(t)
	image, err := shared.image()
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// NeedShell skips the test if the image of [DockerForTest] has no shell, because this
// machine has no static busybox. In CI, which has one, it fails the test.
func NeedShell(t testing.TB) {
	t.Helper()
	_, err := toolFiles()
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("needs busybox-static: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func needDocker(t testing.TB) {
	t.Helper()
	NeedServers(t)
	err := DockerEngine(t.Context())
	if err != nil && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sharedConns is the connection limit of the shared agents, because many tests make blocking
// queries from one address.
const sharedConns = 2000

// shared has the agents that [Main] stops. A test process has one of each, because starting
// them for every test would take most of the time.
var shared = newSharedAgents()

type sharedAgents struct {
	consul func() (*Consul, error)
	nomad  func() (*Nomad, error)
	image  func() (string, error)

	mu     sync.Mutex
	groups []*group
	stops  []func() error
}

func newSharedAgents() *sharedAgents {
	s := &sharedAgents{}
	// Do not use a test's context: the agents outlive the test that starts them.
	ctx := context.Background()
	s.consul = sync.OnceValues(func() (*Consul, error) {
		c, err := StartConsul(ctx, ConsulConfig{MaxHTTPConns: sharedConns})
		if err == nil {
			s.stopLater(c.group, c.Stop)
		}
		return c, err
	})
	s.nomad = sync.OnceValues(func() (*Nomad, error) {
		n, err := StartNomad(ctx, NomadConfig{MaxHTTPConns: sharedConns})
		if err == nil {
			s.stopLater(n.group, n.Stop)
		}
		return n, err
	})
	s.image = sync.OnceValues(func() (string, error) { return DemoImage(ctx) })
	return s
}

func (s *sharedAgents) stopLater(g *group, stop func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.groups = append(s.groups, g)
	s.stops = append(s.stops, stop)
}

// showLogs prints the end of each agent's log, which is removed when the agent stops.
func (s *sharedAgents) showLogs() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.groups {
		for _, a := range g.all {
			fmt.Fprintf(os.Stderr, "The end of the log of %s:\n%s\n", a.Name, tail(a.Log))
		}
	}
}

func (s *sharedAgents) stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, stop := range s.stops {
		errs = append(errs, stop())
	}
	return errors.Join(errs...)
}
