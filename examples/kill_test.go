package examples_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

// killedCreates is how often each plugin is killed in a create. The variable
// KILLED_CREATES of the environment asks for more.
const killedCreates = 10

// isKilledInCreates: given a plugin that is killed in a create, early at first and
// then later and later, when the next process of it is asked to delete the
// session, then nothing is left of it. Every other time the create is repeated
// first, and makes no second sandbox.
func (e example) isKilledInCreates(t *testing.T) {
	times := killedCreates
	if more := os.Getenv("KILLED_CREATES"); more != "" {
		var err error
		times, err = strconv.Atoi(more)
		must.NoError(t, err)
	}
	volume := t.TempDir()
	whole := time.Second // that a create takes: at most, to begin with
	killed, leaked, doubled := 0, 0, 0
	for attempts := 1; killed < times; attempts++ {
		must.Less(t, 10*times, attempts, must.Sprint("the creates are too quick to be killed in"))
		spec := newSpec(volume)
		t.Run("killed in create "+strconv.Itoa(attempts), func(t *testing.T) {
			p := start(t, e.plugin, instance)
			began := time.Now()
			err := killDuring(p, whole*time.Duration(killed)/time.Duration(times), func() error {
				_, err := p.Driver.Create(t.Context(), spec, ignore)
				return err
			})
			if err != nil {
				killed++
			} else { // it was quicker
				whole = min(whole, time.Since(began))
			}
		})
		t.Run("nothing is left of create "+strconv.Itoa(attempts), func(t *testing.T) {
			driver := start(t, e.plugin, instance).Driver
			if attempts%2 == 1 {
				_, _ = driver.Create(t.Context(), spec, ignore) // it may succeed or fail
				running, err := e.runs(t.Context(), spec.SessionID)
				must.NoError(t, err)
				if len(running) > 1 {
					doubled++
					t.Errorf("after a repeat there run: %q", running)
				}
			}
			must.NoError(t, driver.Delete(t.Context(), spec.SessionID))
			left, err := e.left(t.Context(), spec.SessionID)
			must.NoError(t, err)
			if len(left) > 0 {
				leaked++
				t.Errorf("after a delete there is left: %q", left)
			}
			for sandbox, err := range driver.List(t.Context()) {
				must.NoError(t, err)
				must.NotEq(t, spec.SessionID, sandbox.SessionID)
			}
		})
	}
	t.Logf("%s: killed in the middle of %d creates, over the %s that one takes: %d leaked, %d doubled",
		e.plugin.Name, killed, whole.Round(time.Millisecond), leaked, doubled)
}

// isHungInACreate: given a plugin that is stopped by SIGSTOP in a create, when the
// host finds that it hangs, then the create fails, the next process of the plugin
// is up, and after a delete nothing is left.
func (e example) isHungInACreate(t *testing.T) {
	p := start(t, e.plugin, instance)
	hung := p.Status().PID
	spec := newSpec(t.TempDir())
	stop := sync.OnceValue(func() error { return syscall.Kill(hung, syscall.SIGSTOP) })
	_, err := p.Driver.Create(t.Context(), spec, func(runtime.Stage) { _ = stop() })
	must.NoError(t, stop(), must.Sprint("the create told no stage"))
	must.ErrorIs(t, err, runtime.ErrUnavailable)

	must.NoError(t, p.Driver.AwaitReturn(t.Context()))
	must.NotEq(t, hung, p.Status().PID)
	must.NoError(t, p.Driver.Delete(t.Context(), spec.SessionID))
	left, err := e.left(t.Context(), spec.SessionID)
	must.NoError(t, err)
	must.SliceEmpty(t, left)
}

func newSpec(volume string) runtime.Spec {
	now := time.Now()
	return runtime.Spec{
		SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "agent-1",
		VolumeHostPath: volume, CreatedAt: now, ExpiresAt: now.Add(time.Hour),
	}
}

func ignore(runtime.Stage) {}

// killDuring kills the plugin's process some time after call has begun.
func killDuring(p *pluginhost.Running, after time.Duration, call func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), after)
	defer cancel()
	var killing sync.WaitGroup
	var failed error
	killing.Go(func() {
		<-ctx.Done()
		failed = p.Kill()
	})
	err := call()
	cancel() // it need not be waited for any longer
	killing.Wait()
	return errors.Join(err, failed)
}
