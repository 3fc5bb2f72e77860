package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/scheduler"
)

// few is the number of records in the smaller of the two stores.
const few = 100

// standing measures creates and reuses in a store with few records and in one
// with many, in turns.
func (w *world) standing(ctx context.Context, rounds, many int) (report, error) {
	type side struct {
		records int
		replica *replica
		reused  uuid.UUID
		times   stopwatch
	}
	var sides []*side
	for _, n := range []int{few, many} {
		prefix := fmt.Sprintf("standing-%d", n)
		if err := w.fill(ctx, prefix+"/", n); err != nil {
			return nil, fmt.Errorf("fill with %d records: %w", n, err)
		}
		r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: prefix, template: "raw_exec"})
		if err != nil {
			return nil, err
		}
		s := &side{records: n, replica: r, reused: uuid.New(), times: stopwatch{}}
		if err := r.create(ctx, s.reused); err != nil {
			return nil, err
		}
		sides = append(sides, s)
	}
	const reusesPerRound = 20
	for range rounds {
		for _, s := range sides {
			chat := uuid.New()
			if err := s.times.time("create", func() error { return s.replica.create(ctx, chat) }); err != nil {
				return nil, err
			}
			if err := s.replica.delete(ctx, chat); err != nil {
				return nil, err
			}
			for range reusesPerRound {
				if err := s.times.time("reuse", func() error { return s.replica.create(ctx, s.reused) }); err != nil {
					return nil, err
				}
			}
		}
	}
	var out report
	for _, what := range []string{"create", "reuse"} {
		base := timed("standing", fmt.Sprintf("%s beside %d records", what, sides[0].records), sides[0].times[what])
		large := timed("standing", fmt.Sprintf("%s beside %d records", what, sides[1].records), sides[1].times[what])
		large.against(base)
		out = append(out, base, large)
	}
	for _, s := range sides {
		if err := s.replica.delete(ctx, s.reused); err != nil {
			return nil, err
		}
		if err := s.replica.Stop(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// fill writes sessions of a runtime that no replica has, so that no replica
// acts on them.
func (w *world) fill(ctx context.Context, prefix string, n int) error {
	config := api.DefaultConfig()
	config.Address = w.consul.Addr()
	client, err := consul.NewClient(config, nil)
	if err != nil {
		return err
	}
	store, err := consul.New(client, consul.Config{Prefix: prefix, Instance: instanceOf(prefix), Name: "bench", Logger: hclog.NewNullLogger()})
	if err != nil {
		return err
	}
	runCtx, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- store.Run(runCtx) }()

	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range n {
		g.Go(func() error {
			now := time.Now()
			chat := uuid.New()
			lease, err := store.Lock(gctx, chat, time.Minute)
			if err != nil {
				return err
			}
			return lease.Write(gctx, &scheduler.Session{
				SessionID: uuid.New(), ChatID: chat, AgentID: fmt.Sprintf("agent-%d", i%500),
				VolumeHostPath: "/srv/" + chat.String(), Runtime: "nobody", ContainerID: uuid.NewString(),
				CreatedAt: now, ExpiresAt: now.Add(24 * time.Hour), State: scheduler.StateRunning,
			}, scheduler.Release)
		})
	}
	err = g.Wait()
	stop()
	return errors.Join(err, <-ran)
}
