package nomad

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// Create implements [runtime.Driver]. It makes one write to Nomad, the
// registration, and never repeats one whose outcome it does not know.
//
// A sandbox that is not ready within the template's limit gives an error that
// wraps [runtime.ErrNotReady] and [context.DeadlineExceeded].
func (d *Driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if d.instance.id == "" {
		return runtime.Sandbox{}, fmt.Errorf("nomad: create: %w: the instance is not known yet", runtime.ErrUnavailable)
	}
	job, err := d.template.Job(spec, d.instance.id)
	if err != nil {
		return runtime.Sandbox{}, fmt.Errorf("nomad: %w", err)
	}
	if d.cache.purged.has(*job.ID) {
		return runtime.Sandbox{}, fmt.Errorf("nomad: %w: session %s was deleted", runtime.ErrConflict, spec.SessionID)
	}
	if d.refused.has(*job.ID) {
		return runtime.Sandbox{}, fmt.Errorf("nomad: %w: session %s: Nomad refused its job", runtime.ErrConflict, spec.SessionID)
	}
	w, done := d.cache.await(*job.ID)
	defer done()
	_, breaks := d.cache.stream()
	if err := d.register(ctx, job, spec); err != nil {
		return runtime.Sandbox{}, err
	}
	start := &launch{driver: d, spec: spec, jobID: *job.ID, breaks: breaks, progress: progress, changed: w.C}
	return start.untilReady(ctx)
}

// register makes the job, or finds that it stands already. That Nomad refused
// the only registration that there was, it remembers: there is nothing to end.
func (d *Driver) register(ctx context.Context, job *api.Job, spec runtime.Spec) error {
	only := d.registered.add(*job.ID)
	err := d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().EnforceRegister(job, 0, opts)
		return err
	})
	if err == nil {
		return nil
	}
	// Taken, or lost on the way there or back: Nomad knows.
	s, readErr := d.read(ctx, *job.ID)
	if only && !s.known && (isDenied(err) || isRejected(err) && readErr == nil) {
		d.refused.add(*job.ID)
	}
	switch {
	case readErr != nil && isDenied(err):
		return failed(ctx, "register job", err)
	case readErr != nil:
		return errors.Join(failed(ctx, "register job", err), readErr)
	case !s.known && isRejected(err) && !hasNoNamespace(err):
		return fmt.Errorf("nomad: register job: %w: %w", runtime.ErrInvalid, err)
	case !s.known:
		return failed(ctx, "register job", err)
	default:
		return d.fit(s, spec)
	}
}

// fit says whether a job that stands is the one that spec asks for.
func (d *Driver) fit(s state, spec runtime.Spec) error {
	if err := d.notForeign(s); err != nil {
		return err
	}
	var why string
	switch {
	case s.job.Stop:
		why = "it was stopped"
	case s.job.Meta[jobs.MetaSpec] != jobs.Fingerprint(spec):
		why = "it has another spec"
	case s.job.altered():
		why = "its job was registered anew"
	default:
		return nil
	}
	return fmt.Errorf("nomad: %w: session %s: %s", runtime.ErrConflict, spec.SessionID, why)
}

// launch is a registered job on its way to a ready sandbox.
type launch struct {
	driver   *Driver
	spec     runtime.Spec
	jobID    string
	breaks   uint64 // of the event stream, before the registration
	progress func(runtime.Stage)
	changed  <-chan struct{}

	told   map[runtime.Stage]bool
	asked  string     // ID of the allocation whose endpoint is asked
	answer chan error // of that; it never blocks the one who answers
}

// untilReady waits for the sandbox.
func (l *launch) untilReady(ctx context.Context) (runtime.Sandbox, error) {
	l.told, l.answer = make(map[runtime.Stage]bool), make(chan error, 1)
	limit := l.driver.template.Ready().Timeout
	readyCtx, cancel := context.WithTimeout(ctx, limit)
	var beside sync.WaitGroup
	defer beside.Wait()
	defer cancel()
	lookedOut := make(chan error, 1)
	beside.Go(func() { lookedOut <- l.lookOut(readyCtx) })

	for {
		s, _ := l.driver.cache.get(l.jobID)
		if err := l.failure(s); err != nil {
			return runtime.Sandbox{}, err
		}
		if err := l.advance(readyCtx, s, &beside); err != nil {
			return runtime.Sandbox{}, err
		}
		select {
		case err := <-l.answer:
			if err != nil {
				return runtime.Sandbox{}, l.tooLate(ctx, limit, err)
			}
			return l.ready(ctx)
		case <-readyCtx.Done():
			last := <-lookedOut
			switch {
			case l.asked != "": // the probe ends too, and knows what went wrong last
				last = <-l.answer
			case l.told[runtime.StagePlaced]:
				last = errors.New("not all of its tasks have started")
			}
			if !errors.Is(last, context.DeadlineExceeded) {
				last = fmt.Errorf("%w: %w", readyCtx.Err(), last)
			}
			return runtime.Sandbox{}, l.tooLate(ctx, limit, last)
		case <-l.changed:
		}
	}
}

// advance tells what has been reached, and begins to ask the endpoint as soon as
// it is known, or as soon as an answer can say something.
func (l *launch) advance(ctx context.Context, s state, probe *sync.WaitGroup) error {
	alloc := s.sandboxAlloc()
	if alloc == nil || alloc.AllocatedResources == nil { // some lists leave them out: they are on their way
		return nil
	}
	if l.asked == "" {
		settings := l.driver.template.Ready()
		endpoint := endpointOf(alloc, settings.Port)
		if !endpoint.IsValid() {
			return fmt.Errorf("nomad: %w: allocation %s has no address for port %q", runtime.ErrNotReady, alloc.ID, settings.Port)
		}
		l.tell(runtime.StagePlaced)
		// What stays open says something of a container that has started.
		if settings.Check.StayOpen == 0 || allStarted(alloc) {
			l.asked = alloc.ID
			settings.Check.Dial = l.driver.dial
			probe.Go(func() { l.answer <- settings.Check.Wait(ctx, endpoint, l.spec.SessionID) })
		}
	}
	if hasStarted(alloc) {
		l.tell(runtime.StageStarted)
	}
	return nil
}

func (l *launch) tell(stage runtime.Stage) {
	if !l.told[stage] {
		l.told[stage] = true
		l.progress(stage)
	}
}

// ready hands the sandbox out, unless it ended while it was answering.
func (l *launch) ready(ctx context.Context) (runtime.Sandbox, error) {
	l.driver.cache.setReady(l.jobID, l.asked)
	s, _ := l.driver.cache.get(l.jobID)
	if err := l.failure(s); err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox, ok := l.driver.sandbox(s)
	if !ok || sandbox.ContainerID != l.asked {
		return runtime.Sandbox{}, fmt.Errorf("nomad: session %s: %w: its allocation is gone", l.spec.SessionID, runtime.ErrNotReady)
	}
	if err := ctx.Err(); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("nomad: create: %w", err)
	}
	l.tell(runtime.StageReady)
	return sandbox, nil
}

// noSuchVolume is what a Docker engine says of a mount, before its path, if
// there is no such path on the node.
const noSuchVolume = "bind source path does not exist: "

// failure says why the sandbox will not become ready, nil where it may.
func (l *launch) failure(s state) error {
	alloc := s.sandboxAlloc()
	switch {
	case s.gone:
		return fmt.Errorf("nomad: session %s: %w: it was deleted", l.spec.SessionID, runtime.ErrConflict)
	case !s.known:
		return nil // its own events are on their way
	case alloc != nil && runOver(s.job, alloc) != "": // whoever has stopped the job since
		return l.ended(runOver(s.job, alloc))
	case l.driver.fit(s, l.spec) != nil:
		return l.driver.fit(s, l.spec)
	case alloc == nil:
		if eval := s.unplaced(); eval != nil {
			return fmt.Errorf("nomad: %w: %s", runtime.ErrNotPlaced, whyUnplaced(eval))
		}
		return nil
	}
	if state, why := l.driver.stateOf(s, alloc); state == runtime.StateDead || state == runtime.StateLost {
		return l.ended(why)
	}
	return nil
}

// ended tells that the sandbox ended before it was ready: by the caller's mistake
// if the volume is missing.
func (l *launch) ended(why string) error {
	if strings.HasSuffix(why, noSuchVolume+l.spec.VolumeHostPath) {
		return fmt.Errorf("nomad: %w: volume: %s", runtime.ErrInvalid, why)
	}
	return fmt.Errorf("nomad: %w: %s", runtime.ErrNotReady, why)
}

// tooLate says what the sandbox was waiting for when its time ran out.
func (l *launch) tooLate(ctx context.Context, limit time.Duration, last error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("nomad: create: %w", ctx.Err())
	}
	s, _ := l.driver.cache.get(l.jobID)
	if why := waitsFor(s); why != "" {
		last = fmt.Errorf("%s; %w", why, last)
	}
	return fmt.Errorf("nomad: %w within %v: %w", runtime.ErrNotReady, limit, last)
}

// hasStarted says whether one of the allocation's tasks is seen to run.
func hasStarted(alloc *api.AllocationListStub) bool {
	if alloc == nil {
		return false
	}
	for _, task := range alloc.TaskStates {
		if !task.StartedAt.IsZero() {
			return true
		}
	}
	return false
}

// allStarted says whether each of the allocation's tasks is seen to run, or to
// have run.
func allStarted(alloc *api.AllocationListStub) bool {
	for _, task := range alloc.TaskStates {
		if task.StartedAt.IsZero() {
			return false
		}
	}
	return len(alloc.TaskStates) > 0
}
