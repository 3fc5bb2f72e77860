package stack

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
)

// NomadConfig describes the Nomad to start.
type NomadConfig struct {
	// Servers and Clients are the numbers of agents, with their data on disk. 0 Servers
	// means one dev agent, which is server and client, is ready fastest, keeps its data in
	// memory, and is empty after a restart.
	Servers, Clients int
	// HTTPPort is the first server's port, 0 for any free one.
	HTTPPort int
	// Drivers are the drivers that a client needs to be ready; nil for all that this
	// machine allows.
	Drivers []string
	// MaxHTTPConns is how many connections an agent accepts from one client address, 0 for
	// Nomad's default of 100.
	MaxHTTPConns int
	// HeartbeatGrace and MinHeartbeatTTL decide when a silent client counts as lost: at the
	// earliest after about twice the TTL plus the grace. 0 means Nomad's default of 10 s
	// each.
	HeartbeatGrace, MinHeartbeatTTL time.Duration
	// ManagementToken enables ACLs, if it is set. It is a UUID, the secret of the first
	// token.
	ManagementToken string
	// TLS enables TLS, if it is set. The agents then accept only clients with a certificate
	// of a trusted authority.
	TLS *TLSFiles
}

// Nomad is a running Nomad. Each of its clients offers 100 GHz and 100 GB, whatever the
// machine has.
type Nomad struct {
	Servers []*Agent
	Clients []*Agent // for a dev agent the same as Servers
	// ExecDir is a directory, empty at first, that tasks of the exec driver see as their
	// /usr/local/bin. They see nothing else of this machine, so put the static programs
	// that they run there.
	ExecDir string
	// VolumeDir is the directory of the host volume "bivouac" of each client.
	VolumeDir string

	group *group
	nodes []string // names of the clients that have the docker driver
	token string
	tls   *TLSFiles
}

// StartNomad starts a Nomad and returns when it can be used: it has a leader, and every
// client is ready and has the configured drivers. By default these are the drivers that
// this machine allows: raw_exec always, exec as root, docker if an engine answers.
func StartNomad(ctx context.Context, cfg NomadConfig) (*Nomad, error) {
	bin, err := NomadBinary(ctx)
	if err != nil {
		return nil, err
	}
	g, err := newGroup()
	if err != nil {
		return nil, fmt.Errorf("stack: start Nomad: %w", err)
	}
	n := &Nomad{group: g, token: cfg.ManagementToken, tls: cfg.TLS, ExecDir: filepath.Join(g.dir, "exec"), VolumeDir: filepath.Join(g.dir, "volume")}
	if err := n.add(ctx, bin, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("stack: start Nomad: %w", err), n.Stop())
	}
	// Start the servers first: a client that finds no leader tries again only after 15 to
	// 30 s.
	for _, agents := range [][]*Agent{n.Servers, n.Clients} {
		if err := start(ctx, agents); err != nil {
			return nil, errors.Join(err, n.Stop())
		}
	}
	return n, nil
}

// add makes the directories and the agents.
func (n *Nomad) add(ctx context.Context, bin string, cfg NomadConfig) error {
	for _, dir := range []string{n.ExecDir, n.VolumeDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	drivers := cfg.Drivers
	if drivers == nil {
		drivers = allDrivers(ctx)
	}
	agents, err := cfg.agents(n.group.ports)
	if err != nil {
		return err
	}
	for _, config := range agents {
		config.Node, config.ExecDir, config.VolumeDir = n.group.node(config.Name), n.ExecDir, n.VolumeDir
		if err := n.addAgent(bin, config, drivers); err != nil {
			return err
		}
		if config.Client && slices.Contains(drivers, "docker") {
			n.nodes = append(n.nodes, config.Node)
		}
	}
	return nil
}

// allDrivers returns the drivers that this machine allows.
func allDrivers(ctx context.Context) []string {
	drivers := []string{"raw_exec"}
	if os.Geteuid() == 0 {
		drivers = append(drivers, "exec")
	}
	if DockerEngine(ctx) == nil {
		drivers = append(drivers, "docker")
	}
	return drivers
}

func (n *Nomad) addAgent(bin string, config nomadAgent, drivers []string) error {
	a, err := n.group.add(config.Name, bin, loopback(config.HTTP), config.write)
	if err != nil {
		return err
	}
	client, err := n.client(a)
	if err != nil {
		return err
	}
	if config.Server {
		a.rpc = loopback(config.RPC)
		a.ready = func(ctx context.Context) error { return nomadServerReady(ctx, client, config.Node) }
		n.Servers = append(n.Servers, a)
	}
	if config.Client {
		a.ready = func(ctx context.Context) error { return nomadClientReady(ctx, client, config.Node, drivers) }
		n.Clients = append(n.Clients, a)
	}
	if ready := a.ready; n.token != "" {
		a.ready = func(ctx context.Context) error {
			if err := bootstrapACL(ctx, client, n.token); err != nil {
				return err
			}
			return ready(ctx)
		}
	}
	return nil
}

// bootstrapACL creates the first token, if it does not exist.
func bootstrapACL(ctx context.Context, client *api.Client, token string) error {
	_, _, err := client.ACLTokens().BootstrapOpts(token, (&api.WriteOptions{}).WithContext(ctx))
	if isBootstrapped(err) {
		return nil
	}
	return err
}

func isBootstrapped(err error) bool {
	return err != nil && strings.Contains(err.Error(), "bootstrap already done")
}

// nomadServerReady returns nil if the right server answers and knows a leader that answers.
func nomadServerReady(ctx context.Context, client *api.Client, name string) error {
	opts := (&api.QueryOptions{}).WithContext(ctx)
	var self api.AgentSelf
	if _, err := client.Raw().Query("/v1/agent/self", &self, opts); err != nil {
		return err
	}
	if self.Member.Name != name+".global" {
		return fmt.Errorf("another server answers: %s", self.Member.Name)
	}
	_, _, err := client.Nodes().List(opts)
	return err
}

// nomadClientReady returns nil if the servers see the client's node as ready. It asks the
// client for the node's ID, and the servers through the client.
func nomadClientReady(ctx context.Context, client *api.Client, name string, drivers []string) error {
	opts := (&api.QueryOptions{}).WithContext(ctx)
	var self api.AgentSelf
	if _, err := client.Raw().Query("/v1/agent/self", &self, opts); err != nil {
		return err
	}
	// The servers' state of a client that restarts may be from before.
	if self.Stats["client"]["heartbeat_ttl"] == "0s" {
		return errors.New("client has not registered yet")
	}
	node, _, err := client.Nodes().Info(self.Stats["client"]["node_id"], opts)
	if err != nil {
		return err
	}
	if node.Name != name {
		return fmt.Errorf("another client answers: %s", node.Name)
	}
	if node.Status != api.NodeStatusReady {
		return fmt.Errorf("node is %s", node.Status)
	}
	for _, name := range drivers {
		d := node.Drivers[name]
		if d == nil {
			return fmt.Errorf("driver %s is not available yet", name)
		}
		if !d.Detected || !d.Healthy {
			return fmt.Errorf("driver %s: %s", name, d.HealthDescription)
		}
	}
	return nil
}

// client returns a client of one agent.
func (n *Nomad) client(a *Agent) (*api.Client, error) {
	config := &api.Config{Address: "http://" + a.Addr, SecretID: n.token}
	if files := n.tls; files != nil {
		config.Address, config.HttpClient = "https://"+a.Addr, &http.Client{Transport: files.transport()}
	}
	return api.NewClient(config)
}

// Addr returns the first server's address, as host:port.
func (n *Nomad) Addr() string { return n.Servers[0].Addr }

// Client returns a client of the first server, with the management token and a certificate
// if these are needed.
func (n *Nomad) Client() (*api.Client, error) { return n.client(n.Servers[0]) }

// Reload asks all agents to read their TLS files again (SIGHUP). It does not wait until they
// have done so.
func (n *Nomad) Reload() error { return n.group.reload() }

// Leader returns the server that its peers see as the leader.
func (n *Nomad) Leader(ctx context.Context) (*Agent, error) {
	return leader(n.Servers, func(a *Agent) (string, error) {
		client, err := n.client(a)
		if err != nil {
			return "", err
		}
		var addr string
		_, err = client.Raw().Query("/v1/status/leader", &addr, (&api.QueryOptions{}).WithContext(ctx))
		return addr, err
	})
}

// Stop ends all agents and their sandboxes and removes their data.
func (n *Nomad) Stop() error { return n.group.stop(n.removeContainers) }

// removeContainers removes the containers of tasks whose Nomad client was killed before it
// could stop them.
func (n *Nomad) removeContainers() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	for _, node := range n.nodes {
		ids, err := docker(ctx, nil, "ps", "-aq", "--filter=label=com.hashicorp.nomad.node_name="+node)
		if err != nil {
			return err
		}
		if ids == "" {
			continue
		}
		if _, err := docker(ctx, nil, append([]string{"rm", "--force"}, strings.Fields(ids)...)...); err != nil {
			return err
		}
	}
	return nil
}
