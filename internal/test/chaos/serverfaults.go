package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	consulapi "github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/test/stack"
)

// consulFaults returns the faults that hit Consul, its locks and its sessions.
func (w *world) consulFaults() []fault {
	return []fault{
		{"Consul leader killed", 25 * time.Second, nil, func(ctx context.Context) error {
			leader, err := w.leader(ctx)
			if err != nil {
				return err
			}
			return w.revive(ctx, w.between(2*time.Second, 6*time.Second), leader)
		}},
		{"Consul leader paused", 25 * time.Second, nil, func(ctx context.Context) error {
			leader, err := w.leader(ctx)
			if err != nil {
				return err
			}
			if err := leader.Pause(); err != nil {
				return err
			}
			pause(ctx, w.between(4*time.Second, 12*time.Second))
			return errors.Join(leader.Resume(), leader.WaitReady(ctx))
		}},
		{"Consul quorum lost", 30 * time.Second, nil, func(ctx context.Context) error {
			spared := w.below(len(w.consul.Servers))
			var killed []*stack.Agent
			for i, s := range w.consul.Servers {
				if i != spared {
					killed = append(killed, s)
				}
			}
			return w.revive(ctx, w.between(3*time.Second, 7*time.Second), killed...)
		}},
		{"lock key deleted", 5 * time.Second, nil, w.deleteLock},
		{"Consul session destroyed", 5 * time.Second, nil, w.destroySession},
	}
}

// revive kills agents and starts them again after a time.
func (w *world) revive(ctx context.Context, after time.Duration, agents ...*stack.Agent) error {
	for _, a := range agents {
		if err := a.Kill(); err != nil {
			return err
		}
	}
	pause(ctx, after)
	for _, a := range agents {
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

func (w *world) leader(ctx context.Context) (leader *stack.Agent, err error) {
	err = patiently(ctx, func(ctx context.Context) error {
		leader, err = w.consul.Leader(ctx)
		return err
	})
	return leader, err
}

// deleteLock deletes the lock key of an operation that is in progress.
func (w *world) deleteLock(ctx context.Context) error {
	limit := time.Now().Add(4 * time.Second)
	for time.Now().Before(limit) && ctx.Err() == nil {
		var keys []string
		if err := patiently(ctx, func(ctx context.Context) (err error) {
			keys, _, err = w.kv.KV().Keys(prefix+"v1/locks/", "", (&consulapi.QueryOptions{}).WithContext(ctx))
			return err
		}); err != nil {
			return err
		}
		for _, key := range keys {
			if strings.HasSuffix(key, uuid.Nil.String()) {
				continue // the leader's
			}
			w.log.note("delete %s", key)
			return patiently(ctx, func(ctx context.Context) error {
				_, err := w.kv.KV().Delete(key, (&consulapi.WriteOptions{}).WithContext(ctx))
				return err
			})
		}
		pause(ctx, 5*time.Millisecond)
	}
	return errMissed
}

// destroySession destroys the Consul session of a replica, and with it all
// locks of the replica.
func (w *world) destroySession(ctx context.Context) error {
	var sessions []*consulapi.SessionEntry
	if err := patiently(ctx, func(ctx context.Context) (err error) {
		sessions, _, err = w.kv.Session().List((&consulapi.QueryOptions{}).WithContext(ctx))
		return err
	}); err != nil {
		return err
	}
	if len(sessions) == 0 {
		return errMissed
	}
	id := sessions[w.below(len(sessions))].ID
	w.log.note("destroy Consul session %s", id)
	return patiently(ctx, func(ctx context.Context) error {
		_, err := w.kv.Session().Destroy(id, (&consulapi.WriteOptions{}).WithContext(ctx))
		return err
	})
}

// nomadServerFaults returns the faults that hit Nomad's server and its view of
// the nodes.
func (w *world) nomadServerFaults() []fault {
	server := w.nomad.Servers[0]
	return []fault{
		{"Nomad server killed", 30 * time.Second, nil, func(ctx context.Context) error {
			return errors.Join(w.revive(ctx, w.between(0, 4*time.Second), server), w.noteLostNodes(ctx))
		}},
		{"Nomad server paused", 20 * time.Second, nil, func(ctx context.Context) error {
			if err := server.Pause(); err != nil {
				return err
			}
			pause(ctx, w.between(4*time.Second, 13*time.Second))
			return errors.Join(server.Resume(), server.WaitReady(ctx), w.noteLostNodes(ctx))
		}},
		{"no capacity, and capacity back", 15 * time.Second, nil, func(ctx context.Context) error {
			if err := w.eligible(ctx, false); err != nil {
				return err
			}
			pause(ctx, w.between(3*time.Second, 7*time.Second))
			return w.eligible(ctx, true)
		}},
	}
}

// eligible sets whether the nodes accept sandboxes.
func (w *world) eligible(ctx context.Context, yes bool) error {
	return patiently(ctx, func(ctx context.Context) error {
		nodes, err := w.nodes(ctx)
		for _, node := range nodes {
			_, toggleErr := w.jobs.Nodes().ToggleEligibility(node.ID, yes, (&nomadapi.WriteOptions{}).WithContext(ctx))
			err = errors.Join(err, toggleErr)
		}
		return err
	})
}

func (w *world) nodes(ctx context.Context) ([]*nomadapi.NodeListStub, error) {
	nodes, _, err := w.jobs.Nodes().List((&nomadapi.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	return nodes, nil
}

// noteLostNodes records which nodes Nomad recently counted as lost. When such a
// node is back, it ends its sandboxes; that is Nomad's doing.
func (w *world) noteLostNodes(ctx context.Context) error {
	return patiently(ctx, w.tryNoteLostNodes)
}

func (w *world) tryNoteLostNodes(ctx context.Context) error {
	nodes, err := w.nodes(ctx)
	if err != nil {
		return err
	}
	for _, stub := range nodes {
		node, _, err := w.jobs.Nodes().Info(stub.ID, (&nomadapi.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return fmt.Errorf("read node: %w", err)
		}
		for _, e := range node.Events {
			if strings.Contains(e.Message, "heartbeat missed") && time.Since(e.Timestamp) < 6*time.Minute {
				_, name, _ := strings.Cut(stub.Name, "client-")
				name = "client-" + name
				w.log.note("node %s was taken for lost at %s", name, e.Timestamp.Format(time.TimeOnly))
				w.told.lost(hazard{name, e.Timestamp})
			}
		}
	}
	return nil
}

// nomadClientFaults returns the faults that hit the nodes.
func (w *world) nomadClientFaults() []fault {
	one := func() *stack.Agent { return w.nomad.Clients[w.below(len(w.nomad.Clients))] }
	return []fault{
		{"Nomad client killed", 30 * time.Second, nil, func(ctx context.Context) error {
			client := one()
			killed := time.Now()
			err := w.revive(ctx, w.between(0, 3*time.Second), client)
			// A client that is killed within milliseconds after it started a task has not
			// written that down. It then starts the task a second time, which cannot have
			// the port, and with this run the first one ends: "exit code 1".
			for _, session := range w.census.startedAbout(client.Name, killed) {
				w.told.doomAt(session, killed)
			}
			return errors.Join(err, w.noteLostNodes(ctx))
		}},
		{"node cut off and back", 45 * time.Second, nil, func(ctx context.Context) error {
			client := one()
			if err := client.Pause(); err != nil {
				return err
			}
			pause(ctx, w.between(18*time.Second, 25*time.Second))
			return errors.Join(client.Resume(), client.WaitReady(ctx), w.noteLostNodes(ctx))
		}},
	}
}
