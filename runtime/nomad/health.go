package nomad

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/runtime"
)

// Health implements [runtime.HealthChecker]. It returns the first thing, in
// Nomad's words, that would keep sandboxes from being made, followed or ended,
// and says what to do. It changes nothing in Nomad.
func (d *Driver) Health(ctx context.Context) error {
	for _, check := range []func(context.Context) error{
		d.checkLeader, d.checkReads, d.checkStream, d.checkWrites, d.checkNodes, d.checkBroker,
	} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

// check makes a request for Health, which takes no place of other requests.
func (d *Driver) check(ctx context.Context, request func(*api.QueryOptions) error) error {
	return d.whileBusy(ctx, "check", d.checks, askLimit, func(ctx context.Context) error {
		return request((&api.QueryOptions{Namespace: d.namespace}).WithContext(ctx))
	})
}

// tryWrites is how long it counts that Nomad would have taken a registration: its
// log has a line for each that is tried.
const tryWrites = time.Minute

// checkWrites asks whether jobs may be registered and purged.
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

// checkWrite does as check, for a request that would write if it were granted.
func (d *Driver) checkWrite(ctx context.Context, request func(*api.WriteOptions) error) error {
	return d.whileBusy(ctx, "check", d.checks, askLimit, func(ctx context.Context) error {
		return request((&api.WriteOptions{Namespace: d.namespace}).WithContext(ctx))
	})
}

// unfit describes a failed check, and what to do about it.
func unfit(ctx context.Context, doing string, err error, remedy string) error {
	err = failed(ctx, doing, err)
	if ctx.Err() != nil || !errors.Is(err, errDenied) {
		return err
	}
	return fmt.Errorf("%w: %s", err, remedy)
}

// needs is the remedy for a right that is missing.
func needs(rule string) string { return "the token needs " + rule }

// checkLeader asks for what no token is needed.
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
		return fmt.Errorf("nomad: %w: %w", runtime.ErrUnavailable, err)
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

// checkStream tells what Run met with: a stream costs too much to open one here.
func (d *Driver) checkStream(context.Context) error {
	if words := d.streamDenied.Load(); words != nil {
		return fmt.Errorf("nomad: follow events: %w: %s: %s", runtime.ErrUnavailable, *words, needs("the capability read-job in the namespace"))
	}
	return nil
}

// checkRegister registers a job with the condition that it has been changed
// already, at an index that Nomad does not reach. Nomad looks at that last: at
// the namespace, the token, the scheduler's configuration and the job itself
// before, as it does for a sandbox's.
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
		return fmt.Errorf("nomad: %s: %w: Nomad took job %s, which it had to refuse: purge it", doing, runtime.ErrUnavailable, *d.template.Sample().ID)
	case hasNoNamespace(err):
		return fmt.Errorf("%w: set NOMAD_NAMESPACE, or the template's namespace, to one that exists", failed(ctx, doing, err))
	case isRejected(err):
		return fmt.Errorf("%w: the job template has to be corrected", failed(ctx, doing, err))
	case isDenied(err) && strings.Contains(err.Error(), "disabled by the scheduler configuration"):
		return unfit(ctx, doing, err, "turn them on by `nomad operator scheduler set-config -reject-job-registration=false`")
	default:
		return unfit(ctx, doing, err, needs("the capability submit-job in the namespace, and a host_volume rule for each host volume of the template"))
	}
}

// checkPurge purges a job that does not exist.
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

// checkNodes asks for a node that does not exist. The driver reads nodes to see
// whether an operator removed one that is lost.
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

// checkBroker asks whether Nomad decides on jobs at all. Not every token may
// know: then a create that waits in vain tells of it.
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
		return fmt.Errorf("nomad: %w: the eval broker is paused (pause_eval_broker), so that no sandbox is placed: "+
			"turn it on by `nomad operator scheduler set-config -pause-eval-broker=false`", runtime.ErrUnavailable)
	default:
		return nil
	}
}
