package node

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all turns
		leave, err := all.take(t.Context(), "a")
		must.NoError(t, err)
		other, err := all.take(t.Context(), "b")
		must.NoError(t, err)
		other()

		limited, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = all.take(limited, "a")
		must.ErrorIs(t, err, runtime.ErrUnavailable)

		time.AfterFunc(time.Minute, leave)
		next, err := all.take(t.Context(), "a")
		must.NoError(t, err)
		next()
		must.MapLen(t, 0, all.busy)
	})
}
