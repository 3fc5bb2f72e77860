package process

import (
	"context"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// printer is a sandbox that runs a shell script and then serves.
func printer(t *testing.T, script string) (*Driver, runtime.Spec) {
	t.Helper()
	d := openDriver(t, t.TempDir(), "/bin/sh", "-c", script+`; exec "$0"`, os.Args[0])
	spec := newSpec(t, d)
	_, err := d.Create(t.Context(), spec, ignore)
	must.NoError(t, err)
	return d, spec
}

// readAll returns what a query selects, and the offset of the first byte.
func readAll(t *testing.T, d *Driver, sessionID string, query runtime.LogQuery) (offset int64, text string) {
	t.Helper()
	next := int64(-1)
	for chunk, err := range d.Logs(t.Context(), sessionID, query) {
		must.NoError(t, err)
		must.Eq(t, query.Stream, chunk.Stream)
		if next < 0 {
			offset, next = chunk.Offset, chunk.Offset
		}
		must.Eq(t, next, chunk.Offset)
		text, next = text+string(chunk.Data), chunk.Offset+int64(len(chunk.Data))
	}
	return offset, text
}

func TestLogs(t *testing.T) {
	d, spec := printer(t, "echo one; echo two; echo three >&2")
	for name, test := range map[string]struct {
		query  runtime.LogQuery
		offset int64
		want   string
	}{
		"all of stdout":           {runtime.LogQuery{Stream: runtime.Stdout}, 0, "one\ntwo\n"},
		"all of stderr":           {runtime.LogQuery{Stream: runtime.Stderr}, 0, "three\n"},
		"from an offset":          {runtime.LogQuery{Stream: runtime.Stdout, Offset: 4}, 4, "two\n"},
		"from the end":            {runtime.LogQuery{Stream: runtime.Stdout, Offset: -3}, 5, "wo\n"},
		"from before the begin":   {runtime.LogQuery{Stream: runtime.Stdout, Offset: -100}, 0, "one\ntwo\n"},
		"from after the end":      {runtime.LogQuery{Stream: runtime.Stdout, Offset: 100}, 0, ""},
		"from exactly at the end": {runtime.LogQuery{Stream: runtime.Stdout, Offset: 8}, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			offset, text := readAll(t, d, spec.SessionID, test.query)
			must.Eq(t, test.want, text)
			must.Eq(t, test.offset, offset)
		})
	}
	for name, test := range map[string]struct {
		sessionID string
		query     runtime.LogQuery
		want      error
	}{
		"an unknown sandbox": {uuid.NewString(), runtime.LogQuery{Stream: runtime.Stdout}, runtime.ErrNotFound},
		"an unknown stream":  {spec.SessionID, runtime.LogQuery{Stream: "stdin"}, runtime.ErrInvalid},
		"an unknown task":    {spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Task: "web"}, runtime.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			errs := 0
			for chunk, err := range d.Logs(t.Context(), test.sessionID, test.query) {
				must.ErrorIs(t, err, test.want)
				must.Eq(t, runtime.LogChunk{}, chunk)
				errs++
			}
			must.Eq(t, 1, errs)
		})
	}
}

func TestLogsOfASandboxThatEnded(t *testing.T) {
	d := openDriver(t, t.TempDir(), "/bin/sh", "-c", "echo last words; exit 3")
	spec := newSpec(t, d)
	_, err := d.Create(t.Context(), spec, ignore)
	must.ErrorContains(t, err, "exit code 3: last words")

	_, text := readAll(t, d, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true})
	must.Eq(t, "last words\n", text)

	must.NoError(t, d.Delete(t.Context(), spec.SessionID))
	for _, err := range d.Logs(t.Context(), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout}) {
		must.ErrorIs(t, err, runtime.ErrNotFound)
	}
}

// orders makes a sandbox print each line that is written to a named pipe in its volume.
const orders = `mkfifo orders; cat <>orders >&1 & sleep 0`

func order(t *testing.T, spec runtime.Spec, text string) {
	t.Helper()
	pipe, err := os.OpenFile(filepath.Join(spec.VolumeHostPath, "orders"), os.O_WRONLY, 0)
	must.NoError(t, err)
	_, err = pipe.WriteString(text)
	must.NoError(t, err)
	must.NoError(t, pipe.Close())
}

func TestFollow(t *testing.T) {
	t.Run("goes on until the sandbox ends, and has all that it printed", func(t *testing.T) {
		d, spec := printer(t, "echo begin; "+orders)
		var text string
		for chunk, err := range d.Logs(t.Context(), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
			must.NoError(t, err)
			text += string(chunk.Data)
			switch {
			case text == "begin\n":
				order(t, spec, "more\n")
			case strings.HasSuffix(text, "more\n"):
				order(t, spec, strings.Repeat("x", 1000)+"\n")
			case strings.HasSuffix(text, "x\n"):
				must.NoError(t, d.Stop(t.Context(), spec.SessionID))
			}
		}
		must.Eq(t, "begin\nmore\n"+strings.Repeat("x", 1000)+"\n", text)
	})
	t.Run("ends with its context, within a second", func(t *testing.T) {
		d, spec := printer(t, "echo begin")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var cancelled time.Time
		var last error
		for _, err := range d.Logs(ctx, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
			if last = err; err == nil {
				cancelled = time.Now()
				cancel()
			}
		}
		must.ErrorIs(t, last, context.Canceled)
		must.Less(t, time.Second, time.Since(cancelled))
	})
	t.Run("may be left by its reader", func(t *testing.T) {
		d, spec := printer(t, "echo begin")
		for chunk, err := range d.Logs(t.Context(), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
			must.NoError(t, err)
			must.Eq(t, "begin\n", string(chunk.Data))
			break
		}
	})
}

func TestLogsAreBounded(t *testing.T) {
	for name, canFree := range map[string]bool{"by dropping their beginning": true, "by emptying them, on some systems": false} {
		t.Run(name, func(t *testing.T) {
			d, spec := printer(t, "yes 0123456 | head -c 3000000")
			log := d.sandboxes[spec.SessionID].logs[runtime.Stdout]
			path := filepath.Join(d.dir, log.name)
			want := int64(3000000 - maxLog)
			if canFree {
				must.NoError(t, d.cut(log))
				if log.begin != 0 {
					t.Skip("this file system cannot free the beginning of a file")
				}
			} else {
				must.NoError(t, os.Truncate(path, 0)) // as cut does
				log.begin, log.oldest = 3000000, 3000000
				want = 3000000
			}
			info, err := os.Stat(path)
			must.NoError(t, err)
			stat, ok := info.Sys().(*syscall.Stat_t)
			must.True(t, ok)
			must.LessEq(t, maxLog+64<<10, stat.Blocks*512)

			// An offset means the same byte as before.
			order := runtime.LogQuery{Stream: runtime.Stdout}
			offset, text := readAll(t, d, spec.SessionID, order)
			must.Eq(t, strings.Repeat("0123456\n", maxLog/8+1)[want%8:][:3000000-want], text)
			if canFree {
				must.Eq(t, want, offset)
			}
			order.Offset = want + 8
			_, again := readAll(t, d, spec.SessionID, order)
			must.Eq(t, text[min(8, len(text)):], again)

			// What is within the limit is left alone.
			oldest := log.oldest
			must.NoError(t, d.cut(log))
			must.Eq(t, oldest, log.oldest)
		})
	}
}

func TestFollowOf200MB(t *testing.T) {
	const size = 200 << 20
	d, spec := printer(t, "(until [ -e go ]; do sleep 0.01; done; yes 0123456 | head -c 209715200) & sleep 0")
	var before, after goruntime.MemStats
	goruntime.ReadMemStats(&before)
	must.NoError(t, os.WriteFile(filepath.Join(spec.VolumeHostPath, "go"), nil, 0o600))
	next, most := int64(0), uint64(0)
	for chunk, err := range d.Logs(t.Context(), spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}) {
		must.NoError(t, err)
		end := chunk.Offset + int64(len(chunk.Data)) // a slow reader may miss what is dropped
		if next>>24 != end>>24 {
			goruntime.ReadMemStats(&after)
			most = max(most, after.HeapAlloc)
		}
		if next = end; next == size {
			break
		}
	}
	must.Eq(t, size, next)
	must.Less(t, before.HeapAlloc+8<<20, most)
}
