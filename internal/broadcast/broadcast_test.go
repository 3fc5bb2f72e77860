package broadcast_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/broadcast"
)

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		changed := broadcast.Cond{L: &mu}
		count := 0
		var waiting sync.WaitGroup
		var order []int
		for _, want := range []int{2, 1, 0} {
			waiting.Go(func() {
				must.NoError(t, changed.Wait(t.Context(), func() bool {
					if count < want {
						return false
					}
					order = append(order, want)
					return true
				}))
			})
		}
		synctest.Wait()
		must.Eq(t, []int{0}, order, must.Sprint("it does not wait for what is so already"))
		for n := range 2 {
			mu.Lock()
			count++
			changed.Broadcast()
			mu.Unlock()
			synctest.Wait()
			must.Len(t, n+2, order)
		}
		waiting.Wait()
		must.Eq(t, []int{0, 1, 2}, order)
	})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	changed := broadcast.Cond{L: new(sync.Mutex)}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must.ErrorIs(t, changed.Wait(ctx, func() bool { return false }), context.Canceled)
	must.NoError(t, changed.Wait(ctx, func() bool { return true }))
}
