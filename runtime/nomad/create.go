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
	"github.com/bivouac/bivouac/runtime/ready"
)

// Create implements [runtime.Driver]. It makes one write to Nomad, the
// registration, and never repeats one whose outcome it does not know.
//
// A spare needs a node helper on its node. Without one Create returns
// [runtime.ErrNotPlaced].
//
// If the sandbox is not ready within the template's timeout, the error wraps
// [runtime.ErrNotReady] and [context.DeadlineExceeded].
func (d *Driver) Create(ctx context.Context, spec runtime.Spec, progress func(runtime.Stage)) (runtime.Sandbox, error) {
	if d.instance.id == "" {
		return runtime.Sandbox{}, fmt.Errorf("nomad: create: %w: the instance is not known yet", runtime.ErrUnavailable)
	}
	if spec.Pool != "" && d.helper == nil {
		return runtime.Sandbox{}, fmt.Errorf("nomad: create a spare: %w", errNoHelpers)
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
	start := &launch{driver: d, spec: spec, jobID: *job.ID, docker: dockerTasks(job), breaks: breaks, progress: progress, changed: w.C}
	return start.untilReady(ctx)
}

// register registers the job, or finds that it already exists. If Nomad refused
// the only registration of this job, register remembers that: Delete then has
// nothing to do.
func (d *Driver) register(ctx context.Context, job *api.Job, spec runtime.Spec) error {
	only := d.registered.add(*job.ID, struct{}{})
	err := d.tell(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().EnforceRegister(job, 0, opts)
		return err
	})
	if err == nil {
		return nil
	}
	// The ID is taken, or the request or its answer was lost: read what Nomad has.
	s, readErr := d.read(ctx, *job.ID)
	if only && !s.known && (isDenied(err) || isRejected(err) && readErr == nil) {
		d.refused.add(*job.ID, struct{}{})
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

// fit returns an error unless the existing job is the one that spec asks for.
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
		why = "its job was registered again"
	default:
		return nil
	}
	return fmt.Errorf("nomad: %w: session %s: %s", runtime.ErrConflict, spec.SessionID, why)
}

// launch is a registered job whose sandbox is not ready yet.
type launch struct {
	driver   *Driver
	spec     runtime.Spec
	jobID    string
	docker   []string // names of the main tasks that run in Docker
	breaks   uint64   // the event stream's breaks before the registration
	progress func(runtime.Stage)
	changed  <-chan struct{}

	told   map[runtime.Stage]bool
	asked  string     // ID of the allocation whose endpoint is checked
	answer chan error // result of that check; buffered, so sending never blocks
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
	beside.Go(func() { lookedOut <- l.poll(readyCtx) })

	for {
		s, _ := l.driver.cache.get(l.jobID)
		if err := l.failure(s); err != nil {
			cancel()
			return runtime.Sandbox{}, withLastTry(err, l.endCheck())
		}
		if err := l.advance(readyCtx, s, &beside); err != nil {
			return runtime.Sandbox{}, err
		}
		select {
		case err := <-l.answer:
			if err != nil {
				return runtime.Sandbox{}, l.tooLate(ctx, limit, nil, err)
			}
			return l.ready(ctx)
		case <-readyCtx.Done():
			return runtime.Sandbox{}, l.tooLate(ctx, limit, <-lookedOut, l.endCheck())
		case <-l.changed:
		}
	}
}

// advance reports the stages that have been reached. It starts to check the
// endpoint as soon as that is known, or as soon as an answer can mean something.
func (l *launch) advance(ctx context.Context, s state, probe *sync.WaitGroup) error {
	alloc := s.sandboxAlloc()
	if alloc == nil || alloc.AllocatedResources == nil { // some lists leave resources out: wait for them
		return nil
	}
	if l.asked == "" {
		settings := l.driver.template.Ready()
		endpoint := endpointOf(alloc, settings.Port)
		if !endpoint.IsValid() {
			return fmt.Errorf("nomad: %w: allocation %s has no address for port %q", runtime.ErrNotReady, alloc.ID, settings.Port)
		}
		if l.spec.Pool != "" {
			if _, err := l.driver.helperOf(ctx, alloc); err != nil {
				return err
			}
		}
		l.tell(runtime.StagePlaced)
		// StayOpen means something only once the container has started.
		certain := settings.Check.StayOpen != 0
		if !certain || allStarted(alloc) || len(l.docker) > 0 {
			l.asked = alloc.ID
			settings.Check.Dial = l.driver.dial
			probe.Go(func() {
				l.awaitStart(ctx, alloc.ID, certain)
				l.answer <- settings.Check.Wait(ctx, endpoint, l.spec.SessionID)
			})
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

// ready returns the sandbox, unless it ended while it was answering.
func (l *launch) ready(ctx context.Context) (runtime.Sandbox, error) {
	l.driver.cache.setReady(l.jobID, l.asked)
	s, _ := l.driver.cache.get(l.jobID)
	if !s.known { // the event stream began between the job and its allocation
		var err error
		if s, err = l.driver.read(ctx, l.jobID); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	if err := l.failure(s); err != nil {
		return runtime.Sandbox{}, err
	}
	sandbox, ok := l.driver.sandbox(s)
	if !ok || sandbox.ContainerID != l.asked {
		return runtime.Sandbox{}, fmt.Errorf("nomad: session %s: %w: its allocation is gone", l.spec.SessionID, runtime.ErrNotReady)
	}
	if l.spec.Pool != "" {
		if err := l.driver.prepareClaim(ctx, l.spec.SessionID, s.sandboxAlloc()); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	if err := ctx.Err(); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("nomad: create: %w", err)
	}
	l.tell(runtime.StageReady)
	return sandbox, nil
}

// noSuchVolume is the beginning of Docker's error for a mount whose path does not
// exist on the node. The path follows.
const noSuchVolume = "bind source path does not exist: "

// failure returns why the sandbox will not become ready, or nil if it still may.
func (l *launch) failure(s state) error {
	alloc := s.sandboxAlloc()
	switch {
	case s.gone:
		return fmt.Errorf("nomad: session %s: %w: it was deleted", l.spec.SessionID, runtime.ErrConflict)
	case !s.known:
		return nil // its events have not arrived yet
	case alloc != nil && runOver(s.job, alloc) != "": // even if somebody stopped the job since
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

// ended returns the error for a sandbox that ended before it was ready. It is
// ErrInvalid, the caller's mistake, if the volume is missing.
func (l *launch) ended(why string) error {
	if strings.HasSuffix(why, noSuchVolume+l.spec.VolumeHostPath) {
		return fmt.Errorf("nomad: %w: volume: %s", runtime.ErrInvalid, why)
	}
	return fmt.Errorf("nomad: %w: %s", runtime.ErrNotReady, why)
}

// endCheck returns the error of the endpoint's check, or nil if there is none. The
// context of the check must have ended.
func (l *launch) endCheck() error {
	if l.asked == "" {
		return nil
	}
	return <-l.answer
}

// tooLate returns the error for a sandbox that is not ready in time. It says what
// Nomad was doing, and how the endpoint's check failed. If Nomad has not placed the
// sandbox, it says how the reads from Nomad failed.
func (l *launch) tooLate(ctx context.Context, limit time.Duration, read, check error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("nomad: create: %w", ctx.Err())
	}
	err := fmt.Errorf("nomad: %w: %w after %v", runtime.ErrNotReady, context.DeadlineExceeded, limit)
	s, _ := l.driver.cache.get(l.jobID)
	if read != nil && s.sandboxAlloc() == nil {
		err = fmt.Errorf("%w: %w", err, read)
	}
	if now := progress(s); now != "" {
		err = fmt.Errorf("%w: %s", err, now)
	}
	return withLastTry(err, check)
}

// withLastTry adds to err how the endpoint's check failed last.
func withLastTry(err, check error) error {
	if last := ready.LastTry(check); last != nil && errors.Is(err, runtime.ErrNotReady) {
		return fmt.Errorf("%w; the last readiness check: %w", err, last)
	}
	return err
}

// hasStarted reports whether at least one of the allocation's tasks has started.
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

// allStarted reports whether all of the allocation's tasks have started.
func allStarted(alloc *api.AllocationListStub) bool {
	for _, task := range alloc.TaskStates {
		if task.StartedAt.IsZero() {
			return false
		}
	}
	return len(alloc.TaskStates) > 0
}
