package agent

import (
	"context"
	"errors"
	"iter"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// one is a driver with one sandbox. What of a plugin it has takes some time.
type one struct {
	runtime.Driver
	back    time.Duration // until it has come up again
	crashes atomic.Int32  // so many deletes fail
	ended   atomic.Bool
}

func (d *one) AwaitReturn(ctx context.Context) error {
	select {
	case <-time.After(d.back):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *one) List(ctx context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(yield func(runtime.Sandbox, error) bool) { yield(runtime.Sandbox{SessionID: "s"}, ctx.Err()) }
}

func (d *one) Delete(ctx context.Context, _ string) error {
	if d.crashes.Add(-1) >= 0 {
		return errors.New("crashed")
	}
	d.ended.Store(ctx.Err() == nil)
	return ctx.Err()
}

func TestEnding_IsNotKeptWaitingByAPluginThatIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sound, crashed, down := &one{}, &one{back: time.Second}, &one{back: time.Hour}
		crashed.crashes.Store(1)
		failed := endEach(t.Context(), map[string]runtime.Driver{"sound": sound, "crashed": crashed, "down": down}, endOnceUp)
		must.True(t, sound.ended.Load())
		must.True(t, crashed.ended.Load())
		must.MapLen(t, 1, failed)
		must.ErrorContains(t, failed["down"], "runtime down: ")
	})
}
