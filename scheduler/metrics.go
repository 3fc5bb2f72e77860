package scheduler

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/bivouac/bivouac/runtime"
)

// instruments are the metrics of a scheduler. Their names and attributes are in
// internal/agent/METRICS.md.
type instruments struct {
	counters map[string]metric.Int64Counter // by name, of events

	create, stage, reuse, delete, lockWait metric.Float64Histogram

	inFlight metric.Int64UpDownCounter
	lastPass metric.Float64Gauge
	leader   metric.Int64Gauge
	active   activeCount
	pools    poolMetrics
}

// quick returns bucket boundaries for operations that only read records or take locks,
// in seconds.
func quick() metric.HistogramOption {
	return metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5)
}

// slow returns bucket boundaries for operations that start or stop sandboxes, in
// seconds.
func slow() metric.HistogramOption {
	return metric.WithExplicitBucketBoundaries(.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300)
}

func newInstruments(meter metric.Meter, store Store, now func() time.Time) (*instruments, error) {
	in := &instruments{
		counters: make(map[string]metric.Int64Counter),
		active:   activeCount{count: store.Count, now: now},
	}
	var errs []error
	for name, description := range map[string]string{
		"sandbox.create.total":         "Creates by result.",
		"sandbox.delete.total":         "Deletes by result.",
		"sandbox.renew.total":          "Renewals by result.",
		"sandbox.cleanup.total":        "Expired sandboxes cleaned up.",
		"sandbox.cleanup.error.total":  "Failures to clean up, by kind of error.",
		"sandbox.adopt.total":          "Records written anew from what runs.",
		"sandbox.orphan.found.total":   "Sandboxes found without a record, by runtime.",
		"sandbox.orphan.stopped.total": "Sandboxes without a record that were stopped, by runtime.",
	} {
		counter, err := meter.Int64Counter(name, metric.WithDescription(description))
		in.counters[name] = counter
		errs = append(errs, err)
	}
	for _, h := range []struct {
		to                *metric.Float64Histogram
		name, description string
		boundaries        metric.HistogramOption
	}{
		{&in.create, "sandbox.create.duration", "Time of a create that does not reuse a session, by result and runtime.", slow()},
		{&in.stage, "sandbox.create.stage.duration", "Time from asking a runtime for a sandbox until it reaches a stage.", slow()},
		{&in.reuse, "sandbox.reuse.duration", "Time of a create that reuses a session.", quick()},
		{&in.delete, "sandbox.delete.duration", "Time of a delete, by result.", slow()},
		{&in.lockWait, "sandbox.lock.wait", "Time until a chat's lock is taken, or the wait for it fails.", quick()},
	} {
		var err error
		*h.to, err = meter.Float64Histogram(h.name, metric.WithDescription(h.description), metric.WithUnit("s"), h.boundaries)
		errs = append(errs, err)
	}
	var err error
	in.inFlight, err = meter.Int64UpDownCounter("sandbox.inflight", metric.WithDescription("Creates and deletes under way."))
	errs = append(errs, err)
	in.lastPass, err = meter.Float64Gauge("sandbox.pass.last_success", metric.WithUnit("s"),
		metric.WithDescription("Unix time of the last pass that succeeded."))
	errs = append(errs, err)
	in.leader, err = meter.Int64Gauge("bivouac.leader", metric.WithDescription("1 if this replica leads, else 0."))
	errs = append(errs, err)
	_, err = meter.Int64ObservableGauge("sandbox.active.count",
		metric.WithDescription(fmt.Sprintf("Recorded sessions. Changes by other replicas are up to %v late.", maxActiveAge)),
		metric.WithInt64Callback(in.active.observe))
	return in, errors.Join(append(errs, err)...)
}

func result(r string) metric.MeasurementOption {
	return metric.WithAttributes(attribute.String("result", r))
}

// begin counts an operation as in flight until the returned function is called.
func (in *instruments) begin(ctx context.Context, operation string) (end func()) {
	attrs := metric.WithAttributes(attribute.String("operation", operation))
	in.inFlight.Add(ctx, 1, attrs)
	return func() { in.inFlight.Add(ctx, -1, attrs) }
}

// passSucceeded records the time of a successful pass of background work.
func (in *instruments) passSucceeded(ctx context.Context, pass string, more ...attribute.KeyValue) {
	in.lastPass.Record(ctx, float64(time.Now().UnixMilli())/1000, metric.WithAttributes(append(more, attribute.String("pass", pass))...))
}

// timeStages wraps progress so that it records how long each stage takes from now.
func (in *instruments) timeStages(ctx context.Context, runtimeName string, progress func(runtime.Stage)) func(runtime.Stage) {
	began := time.Now()
	return func(stage runtime.Stage) {
		in.stage.Record(ctx, time.Since(began).Seconds(), metric.WithAttributes(
			attribute.String("stage", string(stage)), attribute.String("runtime", runtimeName)))
		progress(stage)
	}
}

// timeEvent records the duration of the use case that an event ends.
func (in *instruments) timeEvent(ctx context.Context, e Event) {
	took := e.Took.Seconds()
	switch e.Type {
	case EventReused:
		in.reuse.Record(ctx, took)
	case EventCreated, EventConflict, EventCreateFailed:
		name := ""
		if e.After != nil {
			name = e.After.Runtime
		}
		in.create.Record(ctx, took, result(e.Result()), metric.WithAttributes(attribute.String("runtime", name)))
	case EventDeleted, EventDeleteNotFound, EventDeleteFailed:
		in.delete.Record(ctx, took, result(e.Result()))
	default:
	}
}

// maxActiveAge is how long the number of sessions is used before they are counted
// again.
const maxActiveAge = time.Minute

// activeCount is the number of recorded sessions. Counting them makes the store list
// all keys, so activeCount does that at most once per maxActiveAge. In between it adds
// what this replica writes, and misses what other replicas write.
type activeCount struct {
	count func(context.Context) (int, error)
	now   func() time.Time

	mu      sync.Mutex
	n       int
	counted time.Time // zero: n is not known
}

func (a *activeCount) observe(ctx context.Context, o metric.Int64Observer) error {
	a.mu.Lock()
	n, age := a.n, a.now().Sub(a.counted)
	a.mu.Unlock()
	if age < 0 || age >= maxActiveAge {
		now := a.now()
		var err error
		if n, err = a.count(ctx); err != nil {
			return fmt.Errorf("count sessions: %w", err)
		}
		a.mu.Lock()
		a.n, a.counted = n, now
		a.mu.Unlock()
	}
	o.Observe(int64(n))
	return nil
}

// wrote adds the change made by a write. After a failed write, whose effect is
// unknown, the next observation counts again.
func (a *activeCount) wrote(change int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.n += change
	if err != nil {
		a.counted = time.Time{}
	}
}

// measuredLocker records how long callers wait for locks, and reports writes to the
// activeCount.
type measuredLocker struct {
	Locker
	in *instruments
}

func (l measuredLocker) Lock(ctx context.Context, chatID uuid.UUID, wait time.Duration) (Lease, error) {
	began := time.Now()
	lease, err := l.Locker.Lock(ctx, chatID, wait)
	if wait > 0 && chatID != uuid.Nil { // not a mere try, nor the leader's lock
		outcome := "taken"
		if err != nil {
			outcome = Kind(err)
		}
		l.in.lockWait.Record(ctx, time.Since(began).Seconds(), result(outcome))
	}
	if err != nil {
		return nil, err
	}
	return measuredLease{lease, &l.in.active}, nil
}

type measuredLease struct {
	Lease
	active *activeCount
}

func (l measuredLease) Write(ctx context.Context, next *Session, then Then, changes ...Change) error {
	return l.counted(next, func() error { return l.Lease.Write(ctx, next, then, changes...) })
}

func (l measuredLease) Claim(ctx context.Context, next *Session, spare Spare, changes ...Change) error {
	return l.counted(next, func() error { return l.Lease.Claim(ctx, next, spare, changes...) })
}

// counted reports a write of next to the activeCount.
func (l measuredLease) counted(next *Session, write func() error) error {
	change := sessions(next) - sessions(l.Session())
	err := write()
	if !errors.Is(err, ErrSpareTaken) { // then nothing was written
		l.active.wrote(change, err)
	}
	return err
}

// sessions returns 1 if the record counts as a session, else 0.
func sessions(record *Session) int {
	if record == nil || record.State == StateCreating {
		return 0
	}
	return 1
}
