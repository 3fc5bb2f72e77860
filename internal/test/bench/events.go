package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/scheduler"
)

const eventsPart = "events"

// manyReaders is how many readers of the events one replica has at most here.
const manyReaders = 1000

// events measures how long after the answer of a create a reader gets the event, with one
// reader and with many, and what the events cost a create.
func (w *world) events(ctx context.Context, rounds int) (report, error) {
	delays, err := w.eventDelays(ctx, rounds)
	if err != nil {
		return nil, err
	}
	writes, err := w.eventWrites(ctx, rounds)
	if err != nil {
		return nil, err
	}
	counts, err := w.eventRequests(ctx)
	return slices.Concat(delays, writes, counts), err
}

// eventDelays creates sandboxes with no reader, with one, and with many. A delay may be
// negative: the event is stored before the create is answered.
func (w *world) eventDelays(ctx context.Context, rounds int) (report, error) {
	r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: "events", template: "raw_exec"})
	if err != nil {
		return nil, err
	}
	var creates, delays report
	for _, readers := range []int{0, 1, manyReaders} {
		took, late, err := r.createBeside(ctx, readers, rounds)
		if err != nil {
			return nil, fmt.Errorf("%d readers: %w", readers, err)
		}
		beside := fmt.Sprintf(", %d readers", readers)
		create := timed(eventsPart, "create"+beside, took)
		if len(creates) > 0 {
			create.against(creates[0])
			delays = append(delays, timed(eventsPart, "answer of a create until its event"+beside, late))
		}
		creates = append(creates, create)
	}
	return append(creates, delays...), r.Stop()
}

// createBeside creates sandboxes beside a number of readers. It returns how long each
// create took, and how long after its answer each reader got the event.
func (r *replica) createBeside(ctx context.Context, readers, rounds int) (took, late []time.Duration, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	var g errgroup.Group
	defer func() {
		stop(nil)
		err = errors.Join(err, g.Wait())
	}()
	got := make(chan arrival, readers)
	for range readers {
		g.Go(func() error {
			if err := r.readEvents(ctx, got); ctx.Err() == nil {
				stop(fmt.Errorf("a reader's events ended: %w", err))
			}
			return nil
		})
	}
	// await waits until every reader has got something of a chat.
	await := func(chat string) (all []time.Time, err error) {
		for len(all) < readers {
			select {
			case a := <-got:
				if a.chat == chat { // else a reader begins with older events
					all = append(all, a.at)
				}
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		return all, nil
	}
	if _, err := await(""); err != nil {
		return nil, nil, err
	}
	for round := range rounds + 1 { // the first round is a warm-up
		chat := uuid.New()
		began := time.Now()
		if err := r.create(ctx, chat); err != nil {
			return nil, nil, err
		}
		answered := time.Now()
		all, err := await(chat.String())
		if err != nil {
			return nil, nil, err
		}
		if err := r.delete(ctx, chat); err != nil {
			return nil, nil, err
		}
		if round == 0 {
			continue
		}
		took = append(took, answered.Sub(began))
		for _, at := range all {
			late = append(late, at.Sub(answered))
		}
	}
	return took, late, nil
}

// arrival is when a reader got the event that a chat's sandbox is ready, or began to read.
type arrival struct {
	chat string // empty: it began to read
	at   time.Time
}

// readEvents reads events until they end, over a connection of its own.
func (r *replica) readEvents(ctx context.Context, got chan<- arrival) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr+"/v1/events?type=ready", nil)
	if err != nil {
		return err
	}
	res, err := new(http.Transport).RoundTrip(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	lines := bufio.NewReader(res.Body)
	tell := func(a arrival) {
		select {
		case got <- a:
		case <-ctx.Done():
		}
	}
	tell(arrival{at: time.Now()})
	for {
		line, err := lines.ReadBytes('\n')
		at := time.Now()
		if err != nil {
			return err
		}
		// Decoding a thousand lines would take longer than what is measured.
		for rest := line; ; {
			_, after, found := bytes.Cut(rest, []byte(`"chat_id":"`))
			if !found {
				break
			}
			chat, _, _ := bytes.Cut(after, []byte(`"`))
			tell(arrival{string(chat), at})
			rest = after
		}
	}
}

// eventWrites writes records with a change in their transaction, and without, in turns.
func (w *world) eventWrites(ctx context.Context, rounds int) (report, error) {
	config := api.DefaultConfig()
	config.Address = w.consul.Addr()
	client, err := consul.NewClient(config, nil)
	if err != nil {
		return nil, err
	}
	store, err := consul.New(client, consul.Config{Prefix: "event-writes/", Instance: "event-writes", Name: "bench", Logger: hclog.NewNullLogger()})
	if err != nil {
		return nil, err
	}
	runCtx, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- store.Run(runCtx) }()
	times, err := writeRecords(ctx, store, rounds)
	stop()
	if err := errors.Join(err, <-ran); err != nil {
		return nil, err
	}
	base := timed(eventsPart, writeAlone, times[writeAlone])
	with := timed(eventsPart, writeWithChange, times[writeWithChange])
	with.against(base)
	with.Count, with.Unit = with.P50-base.P50, "ms more at p50"
	return report{base, with}, nil
}

const (
	writeAlone      = "write of a record"
	writeWithChange = "write of a record with a change"
)

func writeRecords(ctx context.Context, store *consul.Store, rounds int) (stopwatch, error) {
	now := time.Now()
	session := scheduler.Session{
		SessionID: uuid.New(), ChatID: uuid.New(), AgentID: "bench", VolumeHostPath: "/srv", Runtime: "nobody",
		ContainerID: uuid.NewString(), CreatedAt: now, ExpiresAt: now.Add(time.Hour), State: scheduler.StateRunning,
	}
	lease, err := store.Lock(ctx, session.ChatID, time.Minute)
	if err != nil {
		return nil, err
	}
	change := scheduler.Change{
		Type: scheduler.ChangeRenewed, ChatID: session.ChatID, SessionID: session.SessionID, AgentID: session.AgentID,
		Runtime: session.Runtime, Caller: scheduler.DefaultOwner, RequestID: uuid.NewString(),
	}
	const writesPerRound = 20
	times := stopwatch{}
	for range rounds * writesPerRound {
		// In random order, so that none is always the first.
		for what, changes := range map[string][]scheduler.Change{writeAlone: nil, writeWithChange: {change}} {
			session.ExpiresAt = session.ExpiresAt.Add(time.Second)
			for i := range changes {
				changes[i].Time = time.Now()
			}
			if err := times.time(what, func() error { return lease.Write(ctx, &session, scheduler.Keep, changes...) }); err != nil {
				return nil, err
			}
		}
	}
	return times, lease.Write(ctx, nil, scheduler.Release)
}

// eventRequests counts the requests to Consul of a create that store changes and nothing
// else, and those that read them for the replica's readers.
func (w *world) eventRequests(ctx context.Context) (report, error) {
	toConsul, err := newCounter(w.consul.Addr())
	if err != nil {
		return nil, err
	}
	defer toConsul.Close()
	r, err := w.startReplica(ctx, replicaConfig{consul: toConsul.Addr(), nomad: w.nomad.Addr(), prefix: "event-requests", template: "raw_exec"})
	if err != nil {
		return nil, err
	}
	const rounds = 11
	counts := make(map[string][]int)
	for range rounds {
		chat := uuid.New()
		toConsul.take()
		if err := r.create(ctx, chat); err != nil {
			return nil, err
		}
		var record, store, read int
		for _, s := range toConsul.requests() {
			switch {
			case strings.Contains(s.text, chat.String()):
				record++
			case !strings.Contains(s.text, "/v1/events/"):
			case s.write && !isRead(s.text):
				store++
			default:
				read++
			}
		}
		for what, n := range map[string]int{"create and its changes": record, "changes alone": store, "reading the changes": read} {
			counts[what] = append(counts[what], n)
		}
		if err := r.delete(ctx, chat); err != nil {
			return nil, err
		}
	}
	var out report
	for _, what := range []string{"create and its changes", "changes alone", "reading the changes"} {
		slices.Sort(counts[what])
		out = append(out, row{Part: eventsPart, What: what, N: rounds, Count: float64(counts[what][rounds/2]), Unit: "Consul round trips at p50"})
	}
	return out, r.Stop()
}

// isRead reports whether the text of a transaction only reads.
func isRead(text string) bool {
	for _, verb := range []api.KVOp{api.KVSet, api.KVDelete, api.KVDeleteCAS, api.KVDeleteTree, api.KVCAS, api.KVLock} {
		if strings.Contains(text, `"Verb":"`+string(verb)+`"`) {
			return false
		}
	}
	return true
}
