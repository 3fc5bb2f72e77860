package nomad

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
)

const (
	// maxSilence is how long the event stream may be silent. Nomad sends a
	// heartbeat every 30 s.
	maxSilence = 75 * time.Second
	// maxFirst is how long the first message may take. Nomad sends it at once. But
	// since 1.11.2 it answers 200 before it checks the token, and may then stay silent
	// if it denies the stream.
	maxFirst = 5 * time.Second
	// Pauses before the stream is opened again.
	minReopen = 50 * time.Millisecond
	maxReopen = 5 * time.Second
	listPage  = 500 // entries of a list per request
	// verifyEvery is how often the driver checks that there is a leader. A server
	// that lost the others still sends heartbeats, but no more events.
	verifyEvery = 10 // seconds
)

// follow keeps the event stream open until ctx ends.
func (d *Driver) follow(ctx context.Context) error {
	pause := backoff.Backoff{Min: minReopen, Max: maxReopen}
	var told backoff.Throttle
	for {
		wasCurrent, err := d.followOnce(ctx)
		d.cache.setCurrent(false)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if wasCurrent {
			pause.Reset()
			told.Reset()
		}
		if isDenied(err) || errors.Is(err, errNoEvents) {
			if d.streamFault.Swap(&err) == nil {
				told.Reset()
			}
		}
		next := pause.Next()
		d.logger.Log(told.Level(), "nomad_stream_lost", "error", err, "again_in", next)
		if err := backoff.Sleep(ctx, next); err != nil {
			return err
		}
	}
}

var (
	// errNoEvents is returned if an event stream ended before its first message.
	errNoEvents = errors.New("the event stream brings nothing")
	errSilent   = fmt.Errorf("no heartbeat for %v", maxSilence)
	// errTokenChanged ends a stream, because Nomad ends one whose token it no longer
	// accepts, but may not say so.
	errTokenChanged = errors.New("the token has changed")
)

// followOnce opens the event stream and updates the cache from it until it breaks. If
// Nomad denied the stream, or may have, followOnce finds out by a list, which needs the
// same right.
func (d *Driver) followOnce(ctx context.Context) (wasCurrent bool, err error) {
	wasCurrent, err = d.readStream(ctx)
	if wasCurrent || !isDenied(err) && !errors.Is(err, errNoEvents) {
		return wasCurrent, err
	}
	listErr := d.ask(ctx, func(opts *api.QueryOptions) error {
		opts.PerPage = 1
		_, _, err := d.client.Allocations().List(opts)
		return err
	})
	if listErr != nil {
		return false, fmt.Errorf("%s; then list allocations: %w", err.Error(), listErr)
	}
	return false, err
}

// readStream is followOnce without the search for a reason. Events are not durable. So
// once the stream is open, readStream also reads all jobs. After that the cache is
// current.
func (d *Driver) readStream(ctx context.Context) (wasCurrent bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(askLimit, func() { cancel(errNoEvents) })
	defer func() { silence.Stop() }()

	token := d.token.Value()
	topics := url.Values{"topic": {string(api.TopicJob), string(api.TopicAllocation), string(api.TopicEvaluation)}}
	opts := (&api.QueryOptions{Namespace: d.namespace, AuthToken: token}).WithContext(ctx)
	body, err := d.client.Raw().Response("/v1/event/stream?"+topics.Encode(), opts)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return false, err
	}
	defer body.Close()
	silence.Reset(maxFirst)

	var listed chan error // nil until the stream has begun
	defer func() {
		if listed != nil {
			cancel(nil)
			listErr := <-listed
			wasCurrent = listErr == nil
		}
	}()
	decoder := json.NewDecoder(body)
	for {
		var batch struct{ Events []event }
		if err := decoder.Decode(&batch); err != nil {
			switch cause := context.Cause(ctx); {
			case cause != nil:
				err = cause
			case listed == nil:
				err = fmt.Errorf("%w: %w", errNoEvents, err)
			case errors.Is(err, io.EOF):
				err = io.ErrUnexpectedEOF
			}
			return false, err
		}
		// The first message is a heartbeat: from here on no event is missed.
		if listed == nil {
			silence.Stop()
			silence = time.AfterFunc(maxSilence, func() { cancel(errSilent) })
			listed = make(chan error, 1)
			go func() { listed <- d.keepCurrent(ctx, token, cancel) }()
		}
		silence.Reset(maxSilence)
		for _, e := range batch.Events {
			if err := d.apply(e); err != nil {
				d.logger.Warn("nomad_event_damaged", "topic", e.Topic, "key", e.Key, "error", err)
			}
		}
	}
}

// keepCurrent reads all jobs, makes the cache current, and then checks the leader and
// the token regularly until ctx ends. It ends ctx if Nomad does not answer, or if the
// token is no longer that of the stream. It returns nil if the cache was current for
// some time.
func (d *Driver) keepCurrent(ctx context.Context, token string, end context.CancelCauseFunc) error {
	if err := d.readAll(ctx); err != nil {
		end(fmt.Errorf("read all jobs: %w", err))
		return err
	}
	d.streamFault.Store(nil)
	d.cache.setCurrent(true)
	for seconds := 1; backoff.Sleep(ctx, time.Second) == nil; seconds++ {
		if d.token.Value() != token {
			end(errTokenChanged)
			break
		}
		if seconds%verifyEvery != 0 {
			continue
		}
		err := d.ask(ctx, func(opts *api.QueryOptions) error {
			opts.Prefix, opts.PerPage = jobs.IDPrefix, 1
			_, _, err := d.client.Jobs().List(opts)
			return err
		})
		if err != nil {
			end(fmt.Errorf("ask the leader: %w", err))
		}
	}
	return nil
}

// apply updates the cache from one event, if it is about a Bivouac job.
func (d *Driver) apply(e event) error {
	if !strings.HasPrefix(e.jobID(), jobs.IDPrefix) {
		return nil
	}
	switch e.Topic {
	case api.TopicJob:
		var payload struct {
			Job     jobFields
			Deleted bool
		}
		if err := json.Unmarshal(e.Payload, &payload); err != nil {
			return err
		}
		if payload.Deleted {
			d.cache.forget(payload.Job.ID)
		} else {
			d.cache.updateJob(payload.Job)
		}
	case api.TopicAllocation:
		var payload struct{ Allocation *api.AllocationListStub }
		if err := json.Unmarshal(e.Payload, &payload); err != nil {
			return err
		}
		if payload.Allocation != nil {
			d.cache.updateAlloc(payload.Allocation)
		}
	case api.TopicEvaluation:
		var payload struct{ Evaluation *api.Evaluation }
		if err := json.Unmarshal(e.Payload, &payload); err != nil {
			return err
		}
		if payload.Evaluation != nil {
			d.cache.updateEval(payload.Evaluation)
		}
	default: // not subscribed to
	}
	return nil
}

// readAll reads all jobs of this instance and their allocations into the cache.
func (d *Driver) readAll(ctx context.Context) error {
	listed := make(map[string]struct{})
	var index uint64
	for job, err := range d.listJobs(ctx, &index) {
		if err != nil {
			return err
		}
		listed[job.ID] = struct{}{}
		d.cache.updateJob(jobFieldsOfStub(job))
	}
	params := map[string]string{"resources": "true", "task_states": "true"}
	filter := fmt.Sprintf("JobID matches %q", "^"+jobs.IDPrefix)
	var page []*api.AllocationListStub
	read := func(opts *api.QueryOptions) (meta *api.QueryMeta, err error) {
		page, meta, err = d.client.Allocations().List(opts)
		return meta, err
	}
	for err := range d.pages(ctx, "", filter, params, read) {
		if err != nil {
			return fmt.Errorf("list allocations: %w", err)
		}
		for _, alloc := range page {
			d.cache.updateAlloc(alloc)
		}
	}
	d.cache.keepOnly(listed, index)
	for id := range listed {
		d.cache.setWhole(id)
	}
	return nil
}

// pages makes a list request page by page with read. It yields nil after each page.
// It yields the first error and then ends.
func (d *Driver) pages(ctx context.Context, prefix, filter string, params map[string]string, read func(*api.QueryOptions) (*api.QueryMeta, error)) iter.Seq[error] {
	return func(yield func(error) bool) {
		for token := ""; ; {
			err := d.ask(ctx, func(opts *api.QueryOptions) error {
				opts.Prefix, opts.Filter, opts.PerPage, opts.NextToken = prefix, filter, listPage, token
				opts.Params = params
				meta, err := read(opts)
				if err == nil {
					token = meta.NextToken
				}
				return err
			})
			if !yield(err) || err != nil || token == "" {
				return
			}
		}
	}
}
