package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	rounds         = 50 // of each measurement of one request
	reusesPerRound = 10
	cleanupRounds  = 10
	pages          = 20
	pageSize       = 100
	countsLast     = 5 * time.Second // the server counts again after that
)

// most is the target of a row that may not be greater.
func most(v float64) *aim { return &aim{most: v} }

// atMost is the target of a row whose ratio may not be greater.
func atMost(ratio float64) *aim { return &aim{most: ratio, ratio: true} }

// maxStall is how long a write to Consul may take.
const maxStall = 250 // ms

// run is one run.
type run struct {
	consul    string // its address
	consulPID int
	probe     *probe
	few, many *side
	rows      []row
	longest   time.Duration // of all writes of the probe since the replicas started
}

// part measures one or more rows, and adds them with the longest write meanwhile.
func (r *run) part(name string, measure func() ([]row, error)) error {
	fmt.Fprintf(os.Stderr, "measuring: %s\n", name)
	if _, err := r.probe.take(); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	rows, err := measure()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	writes, err := r.probe.take()
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	if len(writes) > 0 {
		longest := writes[len(writes)-1]
		rows[0].longest, r.longest = longest, max(r.longest, longest)
	}
	r.rows = append(r.rows, rows...)
	return nil
}

// bySide is how long each call took on each side, and how many requests the replica sent to
// Consul meanwhile.
type bySide struct {
	took     map[*side][]time.Duration
	requests map[*side][]int64 // empty: not counted
}

func newBySide() bySide {
	return bySide{took: make(map[*side][]time.Duration), requests: make(map[*side][]int64)}
}

// inTurns makes the same call on each side.
func (r *run) inTurns(by bySide, call func(*side) error) error {
	for _, s := range []*side{r.few, r.many} {
		began, before := time.Now(), s.passes.requests.Load()
		if err := call(s); err != nil {
			return fmt.Errorf("%s: %w", s.prefix, err)
		}
		by.took[s] = append(by.took[s], time.Since(began))
		by.requests[s] = append(by.requests[s], s.passes.requests.Load()-before)
	}
	return nil
}

// row returns a row with the times of both sides.
func (r *run) row(what string, by bySide, aim *aim) row {
	return row{
		what: what, unit: "ms", few: percentile(by.took[r.few], 50), many: percentile(by.took[r.many], 50), aim: aim,
		requests: median(by.requests[r.many]),
	}
}

// quiet shows how long writes take while no replica runs, for as long as a full pass takes:
// Consul collects garbage and makes snapshots, too.
func (r *run) quiet(ctx context.Context, records int) ([]row, error) {
	if _, err := r.probe.take(); err != nil {
		return nil, err
	}
	if err := backoff.Sleep(ctx, 10*time.Second+time.Duration(records)*2*time.Minute/1_000_000); err != nil {
		return nil, err
	}
	writes, err := r.probe.take()
	if err != nil {
		return nil, err
	}
	return []row{
		{what: "write to Consul without replicas, p50", unit: "ms", many: percentile(writes, 50)},
		{what: "write to Consul without replicas, p99", unit: "ms", many: percentile(writes, 99)},
		{what: "write to Consul without replicas, slowest", unit: "ms", many: percentile(writes, 100)},
	}, nil
}

// start starts both replicas.
func (r *run) start(ctx context.Context, dir, binary string, few, many int) (rows []row, err error) {
	if r.few, err = startSide(ctx, dir, binary, r.consul, fewPrefix, few); err != nil {
		return nil, err
	}
	if r.many, err = startSide(ctx, dir, binary, r.consul, manyPrefix, many); err != nil {
		return nil, err
	}
	return []row{{
		what: "start of a replica until it serves", unit: "ms", few: ms(r.few.started), many: ms(r.many.started),
		requests: r.many.startRequests,
	}}, nil
}

// reconcile waits for a full pass of both leaders, while nothing else happens.
func (r *run) reconcile(ctx context.Context) ([]row, error) {
	got := make(map[*side]onePass)
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	for _, s := range []*side{r.few, r.many} {
		g.Go(func() error {
			pass, err := s.passes.next(gctx)
			mu.Lock()
			defer mu.Unlock()
			got[s] = pass
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	few, many := got[r.few], got[r.many]
	writes, err := r.probe.take()
	if err != nil {
		return nil, err
	}
	slowest := percentile(writes, 100)
	r.longest = max(r.longest, time.Duration(slowest*float64(time.Millisecond)))
	return []row{
		{what: "full reconcile pass, reading of all records", unit: "s", few: few.took.Seconds(), many: many.took.Seconds()},
		{what: "full reconcile pass, records", unit: "per s", many: float64(r.many.records) / many.took.Seconds()},
		{what: "full reconcile pass, requests in its busiest second", unit: "", few: float64(few.maxRequests), many: float64(many.maxRequests)},
		{what: "full reconcile pass, read in its busiest second", unit: "MB", few: float64(few.maxBytes) / mb, many: float64(many.maxBytes) / mb},
		{what: "write to Consul during the pass, p50", unit: "ms", many: percentile(writes, 50)},
		{what: "write to Consul during the pass, p99", unit: "ms", many: percentile(writes, 99)},
		{what: "write to Consul during the pass, slowest", unit: "ms", many: slowest, aim: most(maxStall)},
	}, nil
}

func (s *side) create(ctx context.Context, chat uuid.UUID, ttl time.Duration) error {
	_, err := s.api.Create(ctx, chat, apiclient.CreateInput{AgentID: "million", VolumeHostPath: s.volume, TTL: ttl})
	return err
}

// creates measures creates, reuses and deletes.
func (r *run) creates(ctx context.Context) ([]row, error) {
	creates, reuses, deletes := newBySide(), newBySide(), newBySide()
	for round := range rounds + 1 {
		if round == 1 { // the first round is a warm-up
			creates, reuses, deletes = newBySide(), newBySide(), newBySide()
		}
		chat := uuid.New()
		if err := r.inTurns(creates, func(s *side) error { return s.create(ctx, chat, 0) }); err != nil {
			return nil, err
		}
		for range reusesPerRound {
			if err := r.inTurns(reuses, func(s *side) error { return s.create(ctx, chat, 0) }); err != nil {
				return nil, err
			}
		}
		if err := r.inTurns(deletes, func(s *side) error { _, err := s.api.Delete(ctx, chat); return err }); err != nil {
			return nil, err
		}
	}
	return []row{
		r.row("create, p50", creates, atMost(1.1)),
		r.row("reuse, p50", reuses, atMost(1.1)),
		r.row("delete, p50", deletes, nil),
	}, nil
}

// cleanup measures a pass that finds a number of expired sessions.
func (r *run) cleanup(ctx context.Context, expired, rounds int) ([]row, error) {
	took := newBySide()
	for range rounds {
		if err := r.expire(ctx, expired); err != nil {
			return nil, err
		}
		err := r.inTurns(took, func(s *side) error {
			answer, err := s.api.Cleanup(ctx)
			if err == nil && (len(answer.Cleaned) != expired || answer.ErrorCount > 0) {
				err = fmt.Errorf("cleaned up %d sessions, want %d; %d errors", len(answer.Cleaned), expired, answer.ErrorCount)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return []row{r.row(fmt.Sprintf("cleanup pass with %d expired", expired), took, nil)}, nil
}

// expire creates sessions on both sides and waits until they have expired.
func (r *run) expire(ctx context.Context, n int) error {
	if n == 0 {
		return nil
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, s := range []*side{r.few, r.many} {
		for range n {
			g.Go(func() error { return s.create(gctx, uuid.New(), scheduler.MinTTL) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return backoff.Sleep(ctx, scheduler.MinTTL+time.Second) // the clocks may differ by up to a second
}

// get measures a request that is made again and again. The first one may cost more.
func (r *run) get(ctx context.Context, what, path string, times int, pause time.Duration) ([]row, error) {
	first, later := newBySide(), newBySide()
	call := func(s *side) error { return fetch(ctx, s.server.Addr, path) }
	if err := r.inTurns(first, call); err != nil {
		return nil, err
	}
	for range times {
		if err := backoff.Sleep(ctx, pause); err != nil {
			return nil, err
		}
		if err := r.inTurns(later, call); err != nil {
			return nil, err
		}
	}
	return []row{r.row(what+", first", first, nil), r.row(what+", p50", later, nil)}, nil
}

func fetch(ctx context.Context, addr, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, res.Status, strings.TrimSpace(string(text)))
	}
	return err
}

// pages measures the pages of a list.
func (r *run) pages(ctx context.Context) ([]row, error) {
	took := newBySide()
	tokens := map[*side]string{}
	for range pages {
		err := r.inTurns(took, func(s *side) error {
			answer, _, err := s.api.List(ctx, apiclient.ListInput{PerPage: pageSize, NextToken: tokens[s]})
			tokens[s] = answer.NextToken
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return []row{r.row(fmt.Sprintf("page of a list, %d sessions, p50", pageSize), took, nil)}, nil
}

// events measures how long after it was stored a reader gets an event.
func (r *run) events(ctx context.Context) ([]row, error) {
	late := newBySide()
	for _, s := range []*side{r.few, r.many} {
		took, err := s.events(ctx)
		if err != nil {
			return nil, err
		}
		late.took[s] = took
	}
	return []row{r.row("event from its write to a reader, p50", late, nil)}, nil
}

func (s *side) events(ctx context.Context) (late []time.Duration, err error) {
	reading, stop := context.WithCancel(ctx)
	got := make(chan time.Duration)
	began := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error {
		first := true
		for batch, err := range s.api.Events(reading, apiclient.EventsInput{Types: []string{"ready"}, Follow: true}) {
			at := time.Now()
			if err != nil {
				return err
			}
			if first {
				close(began)
				first = false
			}
			for _, e := range batch.Events {
				select {
				case got <- at.Sub(e.Payload.Time):
				case <-reading.Done():
				}
			}
		}
		return nil
	})
	defer func() {
		stop()
		if readErr := g.Wait(); reading.Err() == nil {
			err = errors.Join(err, readErr)
		}
	}()
	select {
	case <-began:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for range rounds {
		chat := uuid.New()
		if err := s.create(ctx, chat, 0); err != nil {
			return nil, err
		}
		select {
		case d := <-got:
			late = append(late, d)
		case <-time.After(time.Minute):
			return nil, errors.New("no event within a minute")
		}
		if _, err := s.api.Delete(ctx, chat); err != nil {
			return nil, err
		}
	}
	return late, nil
}

// reads measures what the store reads for expired sessions, for the number of sessions and
// for quotas, as a store that has just begun.
func (r *run) reads(ctx context.Context) ([]row, error) {
	calls := []struct {
		what string
		call func(context.Context, *consul.Store) error
	}{
		{"first look for expired sessions", func(ctx context.Context, s *consul.Store) error {
			_, err := s.Expired(ctx, time.Now(), 1)
			return err
		}},
		{"number of sessions", func(ctx context.Context, s *consul.Store) error { _, err := s.Count(ctx); return err }},
		{"count for a quota", func(ctx context.Context, s *consul.Store) error { _, err := s.CountAgents(ctx, ""); return err }},
		{"count for the quota of a prefix, first", func(ctx context.Context, s *consul.Store) error { _, err := s.CountAgents(ctx, "agent-1"); return err }},
	}
	took := make([]bySide, len(calls))
	for i := range took {
		took[i] = newBySide()
	}
	for _, s := range []*side{r.few, r.many} {
		err := withStore(ctx, r.consul, s.prefix, func(ctx context.Context, store *consul.Store) error {
			for i, c := range calls {
				began := time.Now()
				if err := c.call(ctx, store); err != nil {
					return fmt.Errorf("%s: %w", c.what, err)
				}
				took[i].took[s] = append(took[i].took[s], time.Since(began))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	rows := make([]row, len(calls))
	for i, c := range calls {
		rows[i] = r.row("read of the store: "+c.what, took[i], nil)
	}
	return rows, nil
}

// maxPerSession is how many bytes a replica may need for each session.
const maxPerSession = 1024

// memory measures what processes use.
func (r *run) memory(what string) ([]row, error) {
	few, _, err := r.few.memory()
	if err != nil {
		return nil, err
	}
	many, plugin, err := r.many.memory()
	if err != nil {
		return nil, err
	}
	more := float64(r.many.records - r.few.records)
	return []row{
		{what: "memory of a replica, " + what, unit: "MB", few: float64(few.now) / mb, many: float64(many.now) / mb},
		{what: "memory of a replica, most until then", unit: "MB", few: float64(few.most) / mb, many: float64(many.most) / mb},
		{what: "memory of a replica, most, per session", unit: "bytes", many: float64(many.most-few.most) / more, aim: most(maxPerSession)},
		{what: "memory of the model driver, most", unit: "MB", many: float64(plugin.most) / mb},
	}, nil
}

// consulMemory measures what Consul uses.
func (r *run) consulMemory(what string) ([]row, error) {
	m, err := memoryOf(r.consulPID)
	if err != nil {
		return nil, err
	}
	return []row{
		{what: "memory of Consul, " + what, unit: "MB", many: float64(m.now) / mb},
		{what: "memory of Consul, most until then", unit: "MB", many: float64(m.most) / mb},
	}, nil
}
