package stack

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/shoenig/test/must"
)

// ownerEnv is the environment variable that makes a second run of this test
// binary the process that is killed.
const ownerEnv = "BIVOUAC_STACK_TEST_OWNER"

// owned is what the owner reports that it started.
type owned struct {
	Agents     map[string]int // PIDs by directory of their group
	SandboxURL string
}

func TestAgentsEndWithTheirOwner(t *testing.T) {
	if os.Getenv(ownerEnv) != "" {
		beOwner(t)
	}
	NeedServers(t)

	// Given a process that started a Consul, a second Consul that is paused,
	// and a Nomad that runs a sandbox.
	owner := exec.CommandContext(limited(t), os.Args[0], "-test.run=^"+t.Name()+"$")
	owner.Env = append(os.Environ(), ownerEnv+"=1")
	owner.Stderr = os.Stderr
	stdout, err := owner.StdoutPipe()
	must.NoError(t, err)
	must.NoError(t, owner.Start())
	var started owned
	must.NoError(t, json.NewDecoder(stdout).Decode(&started))
	must.MapLen(t, 3, started.Agents)
	for dir, pid := range started.Agents {
		pids, err := ProcessesWith(markName + "=" + dir)
		must.NoError(t, err)
		must.SliceContains(t, pids, pid)
	}

	// When the process is killed, then all agents end, and the sandbox ends
	// with its agent.
	must.NoError(t, owner.Process.Kill())
	must.Error(t, owner.Wait())
	for dir, pid := range started.Agents {
		eventually(t, "the agent ends", func() error {
			pids, err := ProcessesWith(markName + "=" + dir)
			if slices.Contains(pids, pid) {
				return errors.New("it runs")
			}
			return err
		})
	}
	must.Error(t, answers(started.SandboxURL))
	for dir := range started.Agents {
		must.NoError(t, sweep(dir))
	}
}

// beOwner starts agents, reports them and waits to be killed.
func beOwner(t *testing.T) {
	ctx := context.Background()
	consul, err := StartConsul(ctx, ConsulConfig{})
	must.NoError(t, err)
	paused, err := StartConsul(ctx, ConsulConfig{})
	must.NoError(t, err)
	must.NoError(t, paused.Servers[0].Pause())
	nomad, err := StartNomad(ctx, NomadConfig{})
	must.NoError(t, err)
	client, err := nomad.Client()
	must.NoError(t, err)
	started := owned{Agents: map[string]int{}, SandboxURL: rawExecSandbox(t, nomad).run(t, client)}
	for _, g := range []*group{consul.group, paused.group, nomad.group} {
		started.Agents[g.dir] = g.all[0].PID()
	}
	must.NoError(t, json.NewEncoder(os.Stdout).Encode(started))
	select {}
}
