package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/hashicorp/consul/api"
)

// ConsulConfig describes the Consul to start.
type ConsulConfig struct {
	// Servers is the number of servers in the cluster, with their data on disk. 0 means
	// one dev agent, which is ready fastest, keeps its data in memory, and is empty after
	// a restart.
	Servers int
	// HTTPPort is the first server's port, 0 for any free one.
	HTTPPort int
	// MaxHTTPConns is how many connections an agent accepts from one client address, 0 for
	// Consul's default of 200.
	MaxHTTPConns int
	// ManagementToken enables ACLs with default policy deny, if it is set. It is a UUID,
	// and the token may do everything.
	ManagementToken string
	// TLS enables TLS, if it is set. The agents then accept only clients with a certificate
	// of a trusted authority.
	TLS *TLSFiles
}

// Consul is a running Consul.
type Consul struct {
	Servers []*Agent
	group   *group
	token   string
	tls     *TLSFiles
}

// StartConsul starts a Consul and returns when it can be used: it has a leader, accepts
// writes, and has every server in the catalog.
func StartConsul(ctx context.Context, cfg ConsulConfig) (*Consul, error) {
	bin, err := ConsulBinary(ctx)
	if err != nil {
		return nil, err
	}
	g, err := newGroup()
	if err != nil {
		return nil, fmt.Errorf("stack: start Consul: %w", err)
	}
	c := &Consul{group: g, token: cfg.ManagementToken, tls: cfg.TLS}
	if err := c.add(bin, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("stack: start Consul: %w", err), c.Stop())
	}
	if err := start(ctx, c.Servers); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Consul) add(bin string, cfg ConsulConfig) error {
	type ports struct{ http, server, serf int }
	all := make([]ports, max(cfg.Servers, 1))
	var join []string
	for i := range all {
		for _, port := range []*int{&all[i].http, &all[i].server, &all[i].serf} {
			var err error
			if *port, err = c.group.ports.port(); err != nil {
				return err
			}
		}
		join = append(join, loopback(all[i].serf))
	}
	if cfg.HTTPPort != 0 {
		all[0].http = cfg.HTTPPort
	}
	used, unused := "http", "https"
	if c.tls != nil {
		used, unused = unused, used
	}
	for i, p := range all {
		name := "consul-" + strconv.Itoa(i)
		node := c.group.node(name)
		config := map[string]any{
			"node_name":   node,
			"bind_addr":   "127.0.0.1",
			"client_addr": "127.0.0.1",
			"log_level":   "INFO",
			"ports": map[string]int{
				used: p.http, unused: -1, "server": p.server, "serf_lan": p.serf,
				"serf_wan": -1, "dns": -1, "grpc": -1, "grpc_tls": -1,
			},
			"telemetry":            map[string]any{"prometheus_retention_time": "1h", "disable_hostname": true},
			"disable_update_check": true,
		}
		if files := c.tls; files != nil {
			config["tls"] = map[string]any{
				"defaults": map[string]any{
					"ca_file": files.CA, "cert_file": files.Certificate, "key_file": files.Key,
					"verify_incoming": true, "verify_outgoing": true,
				},
				"internal_rpc": map[string]bool{"verify_server_hostname": true},
			}
		}
		if cfg.MaxHTTPConns != 0 {
			config["limits"] = map[string]int{"http_max_conns_per_client": cfg.MaxHTTPConns}
		}
		if cfg.ManagementToken != "" {
			config["acl"] = map[string]any{
				"enabled": true, "default_policy": "deny",
				"tokens": map[string]string{"initial_management": cfg.ManagementToken, "agent": cfg.ManagementToken},
			}
		}
		if cfg.Servers != 0 {
			config["server"] = true
			config["bootstrap_expect"] = cfg.Servers
			config["retry_join"] = join
			config["retry_interval"] = "1s"
			config["performance"] = map[string]int{"raft_multiplier": 1}
			// A killed server stays a member, because it comes back.
			config["autopilot"] = map[string]bool{"cleanup_dead_servers": false}
		}
		a, err := c.group.add(name, bin, loopback(p.http), func(dir string) ([]string, error) {
			args := []string{"agent", "-config-file=" + filepath.Join(dir, "agent.json")}
			if cfg.Servers == 0 {
				args = append(args, "-dev")
			} else {
				args = append(args, "-data-dir="+filepath.Join(dir, "data"))
			}
			data, err := json.Marshal(config)
			if err != nil {
				return nil, err
			}
			return args, os.WriteFile(filepath.Join(dir, "agent.json"), data, 0o644)
		})
		if err != nil {
			return err
		}
		a.rpc = loopback(p.server)
		client, err := c.client(a)
		if err != nil {
			return err
		}
		a.ready = func(ctx context.Context) error { return consulReady(ctx, client, node) }
		c.Servers = append(c.Servers, a)
	}
	return nil
}

// consulReady returns nil if an agent can be used. Its node must be in the catalog, which
// only the leader knows, because only then can a Consul session be created.
func consulReady(ctx context.Context, client *api.Client, node string) error {
	opts := (&api.QueryOptions{RequireConsistent: true}).WithContext(ctx)
	nodes, _, err := client.Catalog().Nodes(opts)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(nodes, func(n *api.Node) bool { return n.Node == node }) {
		return fmt.Errorf("%s is not in the catalog yet", node)
	}
	return nil
}

// client returns a client of one server.
func (c *Consul) client(a *Agent) (*api.Client, error) {
	config := &api.Config{Address: a.Addr, Token: c.token}
	if files := c.tls; files != nil {
		config.Scheme, config.Transport = "https", files.transport()
	}
	return api.NewClient(config)
}

// Addr returns the first server's address, as host:port.
func (c *Consul) Addr() string { return c.Servers[0].Addr }

// Client returns a client of the first server, with the management token and a certificate
// if these are needed.
func (c *Consul) Client() (*api.Client, error) { return c.client(c.Servers[0]) }

// Reload asks all servers to read their TLS files again (SIGHUP). It does not wait until
// they have done so.
func (c *Consul) Reload() error { return c.group.reload() }

// Leader returns the server that its peers see as the leader.
func (c *Consul) Leader(ctx context.Context) (*Agent, error) {
	return leader(c.Servers, func(a *Agent) (string, error) {
		client, err := c.client(a)
		if err != nil {
			return "", err
		}
		return client.Status().LeaderWithQueryOptions((&api.QueryOptions{}).WithContext(ctx))
	})
}

// Stop ends all agents and removes their data.
func (c *Consul) Stop() error { return c.group.stop() }

func loopback(port int) string { return "127.0.0.1:" + strconv.Itoa(port) }
