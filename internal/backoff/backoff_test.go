package backoff_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/backoff"
)

func TestBackoff(t *testing.T) {
	pause := backoff.Backoff{Min: 100 * time.Millisecond, Max: 300 * time.Millisecond}
	for range 2 {
		for _, most := range []time.Duration{100, 200, 300, 300} {
			got := pause.Next()
			must.Between(t, most*time.Millisecond/2, got, most*time.Millisecond)
		}
		pause.Reset()
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		must.NoError(t, backoff.Sleep(t.Context(), time.Hour))
		must.Eq(t, time.Hour, time.Since(began))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		must.ErrorIs(t, backoff.Sleep(ctx, time.Hour), context.DeadlineExceeded)
		must.Eq(t, time.Hour+time.Second, time.Since(began))
	})
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told backoff.Throttle
		must.Eq(t, hclog.Warn, told.Level())
		must.Eq(t, hclog.Debug, told.Level())
		time.Sleep(time.Minute)
		must.Eq(t, hclog.Warn, told.Level())
		told.Reset()
		must.Eq(t, hclog.Warn, told.Level())
	})
}
