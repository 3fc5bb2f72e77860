package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// The aims of warm starts, in milliseconds, and the sizes of pools.
const (
	warmP50, warmP99 = 10, 40
	warmThreeServers = 15
	burstLimit       = 250
	refillRatio      = 2

	warmPool  = 8
	burstPart = "warm, 100 at once"
	burstPool = 100
)

// warmStarts measures creates that claim a spare beside creates that start a sandbox, many
// claims at once, what refilling a pool costs a reuse, and what an idle spare costs.
func (w *world) warmStarts(ctx context.Context, rounds int) (out report, err error) {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "without warm starts: a node helper needs root")
		return nil, nil
	}
	if w.helpers, err = stack.StartHelpers(ctx, w.nomad, w.binary, w.dir); err != nil {
		return nil, err
	}
	three, err := stack.StartConsul(ctx, stack.ConsulConfig{Servers: 3, MaxHTTPConns: manyConns})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, three.Stop()) }()

	for _, side := range []struct {
		part, template, consul string
		limit                  map[string]float64
	}{
		{"warm, raw_exec", "raw_exec", w.consul.Addr(), nil},
		{"warm, docker", "docker", w.consul.Addr(), map[string]float64{"P50": warmP50, "P99": warmP99}},
		{"warm, docker, 3 Consul servers", "docker", three.Addr(), map[string]float64{"P50": warmThreeServers}},
	} {
		if side.template == "docker" && w.image == "" {
			continue
		}
		rows, err := w.warmBesideCold(ctx, side.part, side.template, side.consul, rounds)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", side.part, err)
		}
		rows[len(rows)-1].Limit = side.limit
		out = append(out, rows...)
	}
	burst, err := w.burst(ctx)
	return append(out, burst...), err
}

// pooled starts a replica with a pool, and waits until the pool is full.
func (w *world) pooled(ctx context.Context, consul, prefix, template string, size int) (*replica, error) {
	file := filepath.Join(w.dir, prefix+".hcl")
	config := w.helpers.Config + fmt.Sprintf("pool \"bench\" {\n  runtime = \"nomad\"\n  size    = %d\n}\n", size)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	r, err := w.startReplica(ctx, replicaConfig{consul: consul, nomad: w.nomad.Addr(), prefix: prefix, template: template,
		flags: []string{"-config=" + file, "-job-var=cpu=1", "-job-var=memory=16"}})
	if err != nil {
		return nil, err
	}
	if err := r.awaitPool(ctx, size); err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	return r, nil
}

// awaitPool waits until a number of spares are ready.
func (r *replica) awaitPool(ctx context.Context, size int) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for {
		answer, err := r.api.Pools(ctx)
		if err != nil {
			return err
		}
		if len(answer.Pools) == 1 && answer.Pools[0].Ready >= size {
			return nil
		}
		if err := backoff.Sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("the pool is not full: %+v: %w", answer.Pools, err)
		}
	}
}

// createWarm creates a session, whose sandbox must be a spare.
func (r *replica) createWarm(ctx context.Context, chat uuid.UUID) error {
	created, err := r.api.Create(ctx, chat, apiclient.CreateInput{AgentID: "bench", VolumeHostPath: r.volume})
	if err == nil && !created.Session.Warm {
		err = errors.New("the session is not warm")
	}
	return err
}

// warmBesideCold measures warm and cold creates in turns. The last row is that of the warm
// ones.
func (w *world) warmBesideCold(ctx context.Context, part, template, consul string, rounds int) (report, error) {
	prefix := "warm-" + uuid.NewString()[:8]
	warm, err := w.pooled(ctx, consul, prefix, template, warmPool)
	if err != nil {
		return nil, err
	}
	cold, err := w.startReplica(ctx, replicaConfig{consul: consul, nomad: w.nomad.Addr(), prefix: prefix + "-cold", template: template})
	if err != nil {
		return nil, errors.Join(err, warm.Stop())
	}
	times := stopwatch{}
	for range rounds + 1 { // the first round is a warm-up
		for _, side := range []struct {
			what string
			r    *replica
			do   func(context.Context, uuid.UUID) error
		}{{"cold create", cold, cold.create}, {"warm create", warm, warm.createWarm}} {
			chat := uuid.New()
			err := times.time(side.what, func() error { return side.do(ctx, chat) })
			if err == nil {
				err = side.r.delete(ctx, chat)
			}
			if err == nil {
				err = warm.awaitPool(ctx, warmPool) // so that nothing is started beside the next one
			}
			if err != nil {
				return nil, errors.Join(err, warm.Stop(), cold.Stop())
			}
		}
	}
	rows := report{timed(part, "cold create", times["cold create"][1:]), timed(part, "warm create", times["warm create"][1:])}
	rows[1].against(rows[0])
	return rows, errors.Join(cold.Stop(), w.empty(ctx, warm, consul, prefix, template))
}

// empty ends the spares of a replica's pool, and the replica.
func (w *world) empty(ctx context.Context, r *replica, consul, prefix, template string) error {
	if err := r.Stop(); err != nil {
		return err
	}
	without, err := w.startReplica(ctx, replicaConfig{consul: consul, nomad: w.nomad.Addr(), prefix: prefix, template: template})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for {
		answer, err := without.api.Pools(ctx)
		if err == nil && len(answer.Pools) == 0 {
			return without.Stop()
		}
		if err == nil {
			err = backoff.Sleep(ctx, 100*time.Millisecond)
		}
		if err != nil {
			return errors.Join(err, without.Stop())
		}
	}
}

// burst measures as many claims at once as a pool has spares, and reuses while the pool is
// refilled.
func (w *world) burst(ctx context.Context) (report, error) {
	const prefix, template = "warm-burst", "raw_exec"
	began := time.Now()
	r, err := w.pooled(ctx, w.consul.Addr(), prefix, template, burstPool)
	if err != nil {
		return nil, err
	}
	filled := time.Since(began)
	idle, err := w.idleCost(ctx, prefix)
	if err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	out, err := r.burst(ctx)
	if err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	out = append(out, row{Part: burstPart, What: "first fill", N: burstPool, Count: burstPool / filled.Seconds(), Unit: "spares per s"})
	return append(out, idle...), w.empty(ctx, r, w.consul.Addr(), prefix, template)
}

// burst measures a replica with a full pool, and leaves it with a full pool.
func (r *replica) burst(ctx context.Context) (report, error) {
	reused := uuid.New()
	if err := r.createWarm(ctx, reused); err != nil {
		return nil, err
	}
	if err := r.awaitPool(ctx, burstPool); err != nil {
		return nil, err
	}
	reuses := func(times stopwatch, what string, n int) error {
		for range n {
			if err := times.time(what, func() error { return r.create(ctx, reused) }); err != nil {
				return err
			}
		}
		return nil
	}
	times := stopwatch{}
	if err := reuses(times, "reuse, pool full", 1000); err != nil {
		return nil, err
	}

	chats := make([]uuid.UUID, burstPool)
	var mu sync.Mutex
	var claims errgroup.Group
	at := time.Now()
	for i := range chats {
		chats[i] = uuid.New()
		claims.Go(func() error {
			err := r.createWarm(ctx, chats[i])
			mu.Lock()
			defer mu.Unlock()
			times.add("claim", time.Since(at))
			return err
		})
	}
	if err := claims.Wait(); err != nil {
		return nil, err
	}
	all := time.Since(at)

	full := make(chan error, 1)
	refilling := time.Now()
	go func() { full <- r.awaitPool(ctx, burstPool) }()
	var err error
	for done := false; !done && err == nil; {
		select {
		case err = <-full:
			done = true
		default:
			err = reuses(times, "reuse, pool being refilled", 20)
		}
	}
	refilled := time.Since(refilling)
	var removal errgroup.Group
	removal.SetLimit(16)
	for _, chat := range append(chats, reused) {
		removal.Go(func() error { return r.delete(ctx, chat) })
	}
	if err := errors.Join(err, removal.Wait()); err != nil {
		return nil, err
	}

	before, during := timed(burstPart, "reuse, pool full", times["reuse, pool full"]), timed(burstPart, "reuse, pool being refilled", times["reuse, pool being refilled"])
	during.Ratio = map[string]float64{"reuse, pool full, by P99": during.P99 / before.P99}
	during.aim("reuse, pool full, by P99", refillRatio)
	last := row{Part: burstPart, What: "until all have their sandbox", N: burstPool, Count: float64(all.Milliseconds()), Unit: "ms", Limit: map[string]float64{"COUNT": burstLimit}}
	return report{
		timed(burstPart, "claim", times["claim"]), last, before, during,
		{Part: burstPart, What: "refill beside reuses", N: burstPool, Count: burstPool / refilled.Seconds(), Unit: "spares per s"},
	}, nil
}

// idleCost measures what the spares of a full pool cost.
func (w *world) idleCost(ctx context.Context, prefix string) (report, error) {
	const part = "an idle spare"
	consul, err := w.consul.Client()
	if err != nil {
		return nil, err
	}
	pairs, _, err := consul.KV().List(prefix+"/v1/spares/", (&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	bytes := 0
	for _, pair := range pairs {
		bytes += len(pair.Key) + len(pair.Value)
	}
	nomad, err := w.nomad.Client()
	if err != nil {
		return nil, err
	}
	evals, allocs := 0, 0
	jobs, _, err := nomad.Jobs().List((&nomadapi.QueryOptions{Prefix: "bivouac-"}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	for _, job := range jobs {
		if job.Type != nomadapi.JobTypeBatch || job.Status != "running" {
			continue
		}
		of, _, err := nomad.Jobs().Evaluations(job.ID, (&nomadapi.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return nil, err
		}
		evals, allocs = evals+len(of), allocs+1
	}
	each := func(what string, total, n int, unit string) row {
		return row{Part: part, What: what, N: n, Count: float64(total) / float64(max(n, 1)), Unit: unit}
	}
	return report{
		each("Consul keys", len(pairs), burstPool, "keys"),
		each("Consul", bytes, len(pairs), "bytes"),
		each("Nomad evaluations", evals, allocs, "evaluations"),
	}, nil
}
