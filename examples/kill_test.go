package examples_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

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
	whole := e.timeOfACreate(t, volume)
	killed, leaked, doubled := 0, 0, 0
	for i := range times {
		spec := newSpec(volume)
		t.Run("killed in create "+strconv.Itoa(i), func(t *testing.T) {
			p := start(t, e.plugin, instance)
			err := killDuring(p, whole*time.Duration(i)/time.Duration(times), func() error {
				_, err := p.driver.Create(t.Context(), spec, ignore)
				return err
			})
			if err != nil { // else it was quicker
				killed++
			}
		})
		t.Run("nothing is left of create "+strconv.Itoa(i), func(t *testing.T) {
			driver := start(t, e.plugin, instance).driver
			if i%2 == 1 {
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
	t.Logf("%s: %d creates, killed in the middle of %d, over the %s that one takes: %d leaked, %d doubled",
		e.plugin.Name, times, killed, whole.Round(time.Millisecond), leaked, doubled)
}

func newSpec(volume string) runtime.Spec {
	now := time.Now()
	return runtime.Spec{
		SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "agent-1",
		VolumeHostPath: volume, CreatedAt: now, ExpiresAt: now.Add(time.Hour),
	}
}

func ignore(runtime.Stage) {}

// timeOfACreate is that of the second one: the first is slower.
func (e example) timeOfACreate(t *testing.T, volume string) (whole time.Duration) {
	t.Run("creates that nobody kills", func(t *testing.T) {
		driver := start(t, e.plugin, instance).driver
		for range 2 {
			spec := newSpec(volume)
			began := time.Now()
			_, err := driver.Create(t.Context(), spec, ignore)
			whole = time.Since(began)
			must.NoError(t, err)
			must.NoError(t, driver.Delete(t.Context(), spec.SessionID))
		}
	})
	return whole
}

// killDuring kills the plugin's process some time after call has begun.
func killDuring(p *process, after time.Duration, call func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), after)
	defer cancel()
	var killing sync.WaitGroup
	var failed error
	killing.Go(func() {
		<-ctx.Done()
		failed = p.kill()
	})
	err := call()
	killing.Wait()
	return errors.Join(err, failed)
}
