package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	wire "github.com/bivouac/bivouac/internal/pluginwire"
	"github.com/bivouac/bivouac/runtime"
)

// instance is one process of a plugin, from its start to its end.
type instance struct {
	timings timings
	process *process
	client  *goplugin.Client
	conn    *grpc.ClientConn
	driver  *wire.Client
	info    runtime.Info
	learned chan struct{} // closed once its existing sandboxes are known, or could not be read
}

// startInstance starts a process of the plugin and calls setUp, all within
// timings.start.
func (p *plugin) startInstance(ctx context.Context, setUp func(*instance, context.Context, *plugin) error) (*instance, error) {
	path, err := p.spec.file(p.dir)
	if err != nil {
		return nil, err
	}
	if err := verify(path, p.spec.SHA256); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, p.timings.start, errStartLimit)
	defer cancel()

	out := newOutput(p.logger)
	inc := &instance{timings: p.timings, learned: make(chan struct{}), process: newProcess(p.spec, path, p.launcher, out)}
	config := wire.ClientConfig()
	config.Logger = hclog.NewNullLogger() // the host itself logs what matters
	config.SyncStdout, config.SyncStderr = out, out
	config.StartTimeout = p.timings.start
	config.RunnerFunc = inc.process.runner
	inc.client = goplugin.NewClient(config)

	// go-plugin's calls take no context. Each of them returns when the process ends.
	stopKilling := context.AfterFunc(ctx, inc.process.kill)
	err = setUp(inc, ctx, p)
	if !stopKilling() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		err = inc.startFailure(ctx, err)
		inc.process.kill()
		inc.client.Kill()
		return nil, err
	}
	return inc, nil
}

var errStartLimit = errors.New("the start took too long")

// setUp connects to a new process and configures it, so that it can take requests.
func (i *instance) setUp(ctx context.Context, p *plugin) error {
	if err := i.meet(ctx, p); err != nil {
		return err
	}
	if !slices.Contains(i.info.Abilities, runtime.AbilityConfigure) {
		if string(p.spec.Config) != emptyConfig {
			return errors.New("configure: the plugin takes no configuration")
		}
		return nil
	}
	if err := i.driver.Configure(ctx, runtime.Config{Instance: p.instance, JSON: p.spec.Config}); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	if slices.Contains(i.info.Abilities, runtime.AbilityClaim) {
		return i.readInfo(ctx) // the variant depends on the configuration
	}
	return nil
}

// meet connects to a new process and reads its info.
func (i *instance) meet(ctx context.Context, _ *plugin) error {
	protocol, err := i.client.Client()
	if err != nil {
		return err
	}
	overGRPC, ok := protocol.(*goplugin.GRPCClient)
	if !ok {
		return fmt.Errorf("its protocol is %T, not gRPC", protocol)
	}
	i.conn = overGRPC.Conn
	if err := i.checkHealth(ctx); err != nil {
		return err
	}
	return i.readInfo(ctx)
}

// readInfo makes the process's driver, which reads its info.
func (i *instance) readInfo(ctx context.Context) (err error) {
	if i.driver, err = wire.NewClient(ctx, i.conn); err != nil {
		return err
	}
	i.info, err = i.driver.Info(ctx)
	return err
}

// startFailure returns the cause behind the error of a start that failed.
func (i *instance) startFailure(ctx context.Context, err error) error {
	greeted, bad := i.process.greeting()
	switch {
	case bad != nil:
		return bad
	case errors.Is(context.Cause(ctx), errStartLimit) && !greeted:
		return fmt.Errorf("it printed no handshake within %s", i.timings.start)
	case errors.Is(context.Cause(ctx), errStartLimit):
		return fmt.Errorf("it did not answer within %s", i.timings.start)
	case i.process.pid() == 0:
		return err
	case i.conn == nil || i.conn.GetState() != connectivity.Ready:
		i.process.awaitEnd(collectLimit)
	}
	select {
	case <-i.process.exited:
		err := i.process.ended()
		if socketErr := i.process.checkSocket(); socketErr != nil && !greeted {
			err = fmt.Errorf("%w; %w", err, socketErr)
		}
		return err
	default:
		return err
	}
}

// watch blocks until the plugin must be started again and returns why, or returns ctx's
// error.
func (i *instance) watch(ctx context.Context) error {
	tick := time.NewTicker(i.timings.healthInterval)
	defer tick.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-i.process.exited:
			return i.process.ended()
		case <-tick.C:
		}
		err := i.checkHealth(ctx)
		if err == nil {
			failures = 0
			continue
		}
		if failures++; failures >= healthFailures {
			return err
		}
	}
}

// checkHealth asks the gRPC health service, which go-plugin makes every plugin serve.
func (i *instance) checkHealth(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, i.timings.healthLimit)
	defer cancel()
	answer, err := grpc_health_v1.NewHealthClient(i.conn).Check(ctx,
		&grpc_health_v1.HealthCheckRequest{Service: goplugin.GRPCServiceName})
	switch {
	case status.Code(err) == codes.Unimplemented:
		return errors.New("health check: it does not serve grpc.health.v1.Health")
	case err != nil:
		return fmt.Errorf("health check: %s", status.Convert(err).Message())
	case answer.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING:
		return fmt.Errorf("health check: its service %q is %s", goplugin.GRPCServiceName, answer.GetStatus())
	}
	return nil
}

// explain adds to the error of a call how the process ended, if the call failed because
// it ended.
func (i *instance) explain(ctx context.Context, err error) error {
	if !errors.Is(err, runtime.ErrUnavailable) || wire.IsAnswer(err) {
		return err
	}
	// A call fails shortly before its connection is known to be broken. The connection
	// breaks shortly before the process can be collected.
	ctx, cancel := context.WithTimeout(ctx, brokenLimit)
	defer cancel()
	if !i.conn.WaitForStateChange(ctx, connectivity.Ready) {
		return err
	}
	i.process.awaitEnd(collectLimit)
	select {
	case <-i.process.exited:
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, i.process.ended())
	default:
		return err
	}
}

// stop asks the process to end, and kills it if it has not ended within timings.stop.
// It returns once the process is gone.
func (i *instance) stop() {
	impatient := time.AfterFunc(i.timings.stop, i.process.kill)
	defer impatient.Stop()
	i.client.Kill()
	<-i.process.exited
}
