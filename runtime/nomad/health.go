package nomad

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// keepWell and keepUnfit are how long a result of Health is kept.
	keepWell  = 5 * time.Second
	keepUnfit = 2 * time.Second
	// tryWrites is how long a successful check of the right to write is kept. Each
	// such check adds a line to Nomad's log.
	tryWrites = time.Minute
)

// health holds the last result of Health.
type health struct {
	turn  chan struct{} // one token; its holder may use the other fields
	err   error
	until time.Time // when err is too old
}

// Health implements [runtime.HealthChecker]. It returns the first problem that
// would keep the driver from creating, following or stopping sandboxes, in Nomad's
// words, and what to do about it. It changes nothing in Nomad.
//
// However often it is called, it tries each of these every few seconds only.
func (d *Driver) Health(ctx context.Context) error {
	select {
	case d.health.turn <- struct{}{}:
		defer func() { <-d.health.turn }()
	case <-ctx.Done():
		return fmt.Errorf("nomad: health: %w", ctx.Err())
	}
	if time.Now().Before(d.health.until) {
		return d.health.err
	}
	err := d.checkAll(ctx)
	if ctx.Err() != nil {
		return err // it may be the caller's
	}
	keep := keepWell
	if err != nil {
		keep = keepUnfit
	}
	d.health.err, d.health.until = err, time.Now().Add(keep)
	return err
}

// RunHealth calls Health regularly until ctx ends, and logs what is wrong. So a problem
// is found before a sandbox is requested. It returns ctx's error.
func (d *Driver) RunHealth(ctx context.Context) error {
	var told backoff.Throttle
	var last error
	for {
		err := d.Health(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			if last == nil || isDenied(err) != isDenied(last) {
				told.Reset()
			}
			d.logger.Log(told.Level(), "nomad_unfit", "error", err)
		case last != nil:
			d.logger.Info("nomad_fit")
		}
		last = err
		if err := backoff.Sleep(ctx, keepWell); err != nil {
			return err
		}
	}
}

func (d *Driver) checkAll(ctx context.Context) error {
	for _, check := range []func(context.Context) error{
		d.checkLeader, d.checkReads, d.checkStream, d.checkWrites, d.checkNodes, d.checkBroker,
	} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

// check makes a request for Health. It does not count as one of the maxRequests.
func (d *Driver) check(ctx context.Context, request func(*api.QueryOptions) error) error {
	return d.query(ctx, limits{"check", nil, askLimit}, request)
}

// checkWrites checks whether the token may register and purge jobs.
func (d *Driver) checkWrites(ctx context.Context) error {
	if last := d.mayWrite.Load(); last != nil && time.Since(*last) < tryWrites {
		return nil
	}
	if err := d.checkRegister(ctx); err != nil {
		return err
	}
	if err := d.checkPurge(ctx); err != nil {
		return err
	}
	d.mayWrite.Store(new(time.Now()))
	return nil
}

// checkWrite is like check, for a request that would write.
func (d *Driver) checkWrite(ctx context.Context, request func(*api.WriteOptions) error) error {
	return d.write(ctx, limits{"check", nil, askLimit}, request)
}

// unfit returns the error of a failed check. It adds the remedy if Nomad denied the
// request.
func unfit(ctx context.Context, doing string, err error, remedy string) error {
	err = failed(ctx, doing, err)
	if ctx.Err() != nil || !isDenied(err) {
		return err
	}
	return fmt.Errorf("%w: %s", err, remedy)
}

// needs returns the remedy for a missing right.
func needs(rule string) string { return "the token needs " + rule }

// checkLeader checks whether Nomad has a leader. It needs no token.
func (d *Driver) checkLeader(ctx context.Context) error {
	var leader string
	err := d.check(ctx, func(opts *api.QueryOptions) error {
		_, err := d.client.Raw().Query("/v1/status/leader", &leader, opts)
		return err
	})
	if err == nil && leader == "" {
		err = errors.New("no leader")
	}
	if err != nil {
		return unfit(ctx, "ask for the leader", err, "the Task API needs a valid token for every request")
	}
	return nil
}

func (d *Driver) checkReads(ctx context.Context) error {
	err := d.check(ctx, func(opts *api.QueryOptions) error {
		opts.Prefix, opts.PerPage = *d.template.Sample().ID, 1
		_, _, err := d.client.Jobs().List(opts)
		return err
	})
	if err != nil {
		return unfit(ctx, "list jobs", err, needs("the capability list-jobs in the namespace"))
	}
	err = d.check(ctx, func(opts *api.QueryOptions) error {
		_, _, err := d.client.Jobs().Info(*d.template.Sample().ID, opts)
		return err
	})
	if err != nil && !isNotFound(err) {
		return unfit(ctx, "read a job", err, needs("the capability read-job in the namespace"))
	}
	return nil
}

// checkStream returns the error that Run got from the event stream. To open another
// stream for the check would cost too much.
func (d *Driver) checkStream(ctx context.Context) error {
	if fault := d.streamFault.Load(); fault != nil {
		return unfit(ctx, "follow events", *fault, needs("the capability read-job in the namespace"))
	}
	return nil
}

// checkRegister tries to register a job under a condition that is never true: that
// the job was last changed at an index that Nomad does not reach. Nomad checks the
// condition last. Before that it checks the namespace, the token, the scheduler's
// configuration and the job itself, as it does for a sandbox's job.
func (d *Driver) checkRegister(ctx context.Context) error {
	const doing = "try to register a job"
	err := d.checkWrite(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().EnforceRegister(d.template.Sample(), math.MaxInt64, opts)
		return err
	})
	switch {
	case isTaken(err):
		return nil
	case err == nil:
		return fmt.Errorf("nomad: %s: %w: Nomad accepted job %s, which it should have refused: purge it", doing, runtime.ErrUnavailable, *d.template.Sample().ID)
	case hasNoNamespace(err):
		return fmt.Errorf("%w: set NOMAD_NAMESPACE, or the template's namespace, to one that exists", failed(ctx, doing, err))
	case isRejected(err):
		return fmt.Errorf("%w: correct the job template", failed(ctx, doing, err))
	case isDenied(err) && strings.Contains(err.Error(), "disabled by the scheduler configuration"):
		return unfit(ctx, doing, err, "turn them on with `nomad operator scheduler set-config -reject-job-registration=false`")
	default:
		return unfit(ctx, doing, err, needs("the capability submit-job in the namespace, and a host_volume rule for each host volume of the template"))
	}
}

// checkPurge checks whether the token may purge jobs. It purges one that does not
// exist.
func (d *Driver) checkPurge(ctx context.Context) error {
	err := d.checkWrite(ctx, func(opts *api.WriteOptions) error {
		_, _, err := d.client.Jobs().Deregister(*d.template.Sample().ID, true, opts)
		return err
	})
	if err != nil {
		return unfit(ctx, "try to purge a job", err, needs("the capability submit-job in the namespace, or deregister-job and purge-job"))
	}
	return nil
}

// checkNodes checks whether the token may read nodes. It reads one that does not
// exist. The driver reads nodes to see whether an operator removed a lost one.
func (d *Driver) checkNodes(ctx context.Context) error {
	err := d.check(ctx, func(opts *api.QueryOptions) error {
		_, _, err := d.client.Nodes().Info("00000000-0000-4000-8000-000000000000", opts)
		return err
	})
	if err != nil && !isNotFound(err) {
		return unfit(ctx, "read a node", err, needs(`node { policy = "read" }`))
	}
	return nil
}

// checkBroker checks whether Nomad's eval broker is paused. It returns nil if the
// token may not read that; then a create that times out reports it.
func (d *Driver) checkBroker(ctx context.Context) error {
	var config *api.SchedulerConfiguration
	err := d.check(ctx, func(opts *api.QueryOptions) error {
		answer, _, err := d.client.Operator().SchedulerGetConfiguration(opts)
		if err == nil {
			config = answer.SchedulerConfig
		}
		return err
	})
	switch {
	case isDenied(err):
		return nil
	case err != nil:
		return failed(ctx, "read the scheduler's configuration", err)
	case config != nil && config.PauseEvalBroker:
		return fmt.Errorf("nomad: %w: the eval broker is paused (pause_eval_broker), so no sandbox is placed: "+
			"turn it on with `nomad operator scheduler set-config -pause-eval-broker=false`", runtime.ErrUnavailable)
	default:
		return nil
	}
}
