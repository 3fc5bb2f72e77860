package stack

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
)

func TestNomadDevAgent(t *testing.T) {
	NeedServers(t)
	// Given a dev agent that runs a sandbox of every driver.
	n, err := StartNomad(limited(t), NomadConfig{})
	must.NoError(t, err)
	client, err := n.Client()
	must.NoError(t, err)
	var urls []string
	for _, s := range sandboxes(t, n) {
		urls = append(urls, s.run(t, client))
	}

	// When it stops, then nothing is left of any of them.
	must.NoError(t, n.Stop())
	for _, url := range urls {
		must.Error(t, answers(url))
	}
	leavesNothing(t, n.group)
}

func TestNomadCluster(t *testing.T) {
	NeedServers(t)
	// Given a server and two clients, one of which runs sandboxes.
	ctx := limited(t)
	n, err := StartNomad(ctx, NomadConfig{
		Servers: 1, Clients: 2,
		HeartbeatGrace: time.Second, MinHeartbeatTTL: time.Second,
	})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	client, err := n.Client()
	must.NoError(t, err)
	leader, err := n.Leader(ctx)
	must.NoError(t, err)
	must.Eq(t, n.Servers[0], leader)
	must.NoError(t, n.Clients[1].Stop())
	var urls []string
	for _, s := range sandboxes(t, n) {
		urls = append(urls, s.run(t, client))
	}

	// When the server restarts, then it still knows its jobs.
	must.NoError(t, n.Servers[0].Restart(ctx))
	jobs, _, err := client.Jobs().List(nil)
	must.NoError(t, err)
	must.Len(t, len(urls), jobs)

	// When that client is killed, then its node is down, and its sandboxes live.
	must.NoError(t, n.Clients[0].Kill())
	eventually(t, "both nodes are down", func() error {
		nodes, _, err := client.Nodes().List(nil)
		if err != nil {
			return err
		}
		for _, node := range nodes {
			if node.Status != api.NodeStatusDown {
				return errors.New(node.Name + " is " + node.Status)
			}
		}
		return nil
	})
	for _, url := range urls {
		must.NoError(t, answers(url))
	}

	// When the cluster stops, then nothing is left of them either.
	must.NoError(t, n.Stop())
	for _, url := range urls {
		must.Error(t, answers(url))
	}
	leavesNothing(t, n.group)
}

func TestNomadServers(t *testing.T) {
	NeedServers(t)
	// Given three servers and a job.
	ctx := limited(t)
	n, err := StartNomad(ctx, NomadConfig{Servers: 3})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	client, err := n.Client()
	must.NoError(t, err)
	job := api.NewBatchJob("waits", "waits", "global", 50).AddTaskGroup(
		api.NewTaskGroup("sandbox", 1).AddTask(api.NewTask("sandbox", "raw_exec").SetConfig("command", "true")))
	_, _, err = client.Jobs().Register(job, nil)
	must.NoError(t, err)
	first, err := n.Leader(ctx)
	must.NoError(t, err)

	// When the leader is killed, then another leads.
	must.NoError(t, first.Kill())
	var second *Agent
	eventually(t, "another server leads", func() (err error) {
		second, err = n.Leader(ctx)
		return err
	})
	must.NotEq(t, first, second)

	// When the killed one starts again, then it has the job.
	must.NoError(t, first.Restart(ctx))
	client, err = n.client(first)
	must.NoError(t, err)
	_, _, err = client.Jobs().Info("waits", nil)
	must.NoError(t, err)
}
