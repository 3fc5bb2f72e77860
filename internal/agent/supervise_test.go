package agent

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"
)

// untilTold runs until its context ends, and notes that it did.
func untilTold(name string, stopped *[]string) part {
	return part{name, func(ctx context.Context) error {
		<-ctx.Done()
		*stopped = append(*stopped, name)
		return ctx.Err()
	}}
}

func TestPartsStopLastOneFirst(t *testing.T) {
	var stopped []string
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := supervise(ctx, []part{untilTold("store", &stopped), untilTold("scheduler", &stopped), untilTold("http", &stopped)}, time.Minute)
	must.NoError(t, err)
	must.Eq(t, []string{"http", "scheduler", "store"}, stopped)
}

func TestAPartThatFailsEndsAll(t *testing.T) {
	broken := errors.New("broken")
	for name, err := range map[string]error{"with an error": broken, "without one": nil} {
		t.Run(name, func(t *testing.T) {
			var stopped []string
			failing := part{"store", func(context.Context) error { return err }}
			got := supervise(t.Context(), []part{failing, untilTold("http", &stopped)}, time.Minute)
			must.ErrorContains(t, got, "store: it ended by itself")
			if err != nil {
				must.ErrorIs(t, got, broken)
			}
			must.Eq(t, []string{"http"}, stopped)
		})
	}
}

func TestAFailureWhileStoppingIsTold(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	broken := errors.New("broken")
	err := supervise(ctx, []part{{"sandboxes", func(ctx context.Context) error {
		<-ctx.Done()
		return broken
	}}}, time.Minute)
	must.ErrorIs(t, err, broken)
	must.ErrorContains(t, err, "sandboxes: ")
}

func TestAPartThatHangsIsNotWaitedForForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		defer close(release)
		var stopped []string
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		err := supervise(ctx, []part{
			{"scheduler", func(context.Context) error { <-release; return nil }},
			untilTold("http", &stopped),
		}, 45*time.Second)
		must.ErrorContains(t, err, "scheduler did not stop within 45s")
		must.Eq(t, 45*time.Second, time.Since(began))
		must.True(t, slices.Contains(stopped, "http"))
	})
}
