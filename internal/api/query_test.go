package api

import (
	"testing"
	"unicode/utf8"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

// Whatever stands in a query, it is refused as the caller's mistake or is within
// the limits.
func FuzzQuery(f *testing.F) {
	for _, raw := range []string{
		"", "agent_id=a%20b&per_page=1000&next_token=t&index=7&wait=30s", "per_page=0", "index=-1",
		"wait=10m1s&index=1", "agent_id=%ff", "a;b", "index=18446744073709551616", "next_token=&next_token=",
	} {
		f.Add(raw)
	}
	known := []string{"agent_id", "per_page", "next_token", "index", "wait"}
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := parseQuery(raw, known)
		if err != nil {
			must.ErrorIs(t, err, scheduler.ErrInvalid)
			return
		}
		for name, value := range q {
			must.SliceContains(t, known, name)
			must.NotEq(t, "", value)
			must.True(t, utf8.ValidString(value))
		}
		if n, err := q.perPage(); err != nil {
			must.ErrorIs(t, err, scheduler.ErrInvalid)
		} else {
			must.Between(t, 1, n, scheduler.MaxPerPage)
		}
		if block, err := q.block(); err != nil {
			must.ErrorIs(t, err, scheduler.ErrInvalid)
		} else {
			must.Eq(t, block.Index == 0, block.Wait == 0)
			must.Between(t, 0, block.Wait, maxWait)
		}
	})
}
