package stack

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"text/template"
	"time"
)

// nomadAgent is the input of the template for an agent's configuration.
type nomadAgent struct {
	NomadConfig
	Name, Node          string
	Server, Client, Dev bool
	HTTP, RPC, Serf     int
	FirstPort, LastPort int      // ports of a client's sandboxes
	Join, RPCs          []string // the servers' serf and RPC addresses
	ExecDir, VolumeDir  string
}

// agents assigns ports to the agents, servers first.
func (c NomadConfig) agents(ports *portBlock) ([]nomadAgent, error) {
	var agents []nomadAgent
	for i := range c.Servers {
		agents = append(agents, nomadAgent{Name: "server-" + strconv.Itoa(i), Server: true})
	}
	for i := range c.Clients {
		agents = append(agents, nomadAgent{Name: "client-" + strconv.Itoa(i), Client: true})
	}
	if c.Servers == 0 {
		c.Servers, c.Clients = 1, 1
		agents = []nomadAgent{{Name: "nomad", Server: true, Client: true, Dev: true}}
	}
	var join, rpcs []string
	clients := 0
	for i := range agents {
		a := &agents[i]
		for _, port := range []*int{&a.HTTP, &a.RPC, &a.Serf} {
			var err error
			if *port, err = ports.port(); err != nil {
				return nil, err
			}
		}
		if a.Server {
			join, rpcs = append(join, loopback(a.Serf)), append(rpcs, loopback(a.RPC))
		}
		if a.Client {
			a.FirstPort, a.LastPort = ports.sandboxPorts(clients, c.Clients)
			clients++
		}
	}
	for i := range agents {
		agents[i].NomadConfig, agents[i].Join, agents[i].RPCs = c, join, rpcs
	}
	if c.HTTPPort != 0 {
		agents[0].HTTP = c.HTTPPort
	}
	return agents, nil
}

// FailoverHeartbeatTTL returns how long a new leader waits for the first heartbeat of a
// client. It is long enough for each client to find the leader, but shorter than Nomad's 5
// minutes if heartbeats are short.
func (c NomadConfig) FailoverHeartbeatTTL() time.Duration { return 5 * c.MinHeartbeatTTL }

//go:embed nomad.hcl.tmpl
var nomadTemplate string

// write writes the configuration to the agent's directory and returns the arguments of its
// command.
func (a nomadAgent) write(dir string) ([]string, error) {
	t, err := template.New("nomad.hcl").Funcs(template.FuncMap{
		// A string, or a list of strings, is the same in JSON and HCL.
		"hcl": func(v any) (string, error) {
			data, err := json.Marshal(v)
			return string(data), err
		},
	}).Parse(nomadTemplate)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := t.Execute(&out, a); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "agent.hcl")
	args := []string{"agent", "-config=" + file, "-data-dir=" + filepath.Join(dir, "data")}
	if a.Dev {
		args = append(args, "-dev")
	}
	return args, os.WriteFile(file, out.Bytes(), 0o644)
}
