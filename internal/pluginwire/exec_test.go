package pluginwire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoenig/test/must"
	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// execs is a driver whose commands are functions.
func execs(t *testing.T, run func(context.Context, runtime.Command, runtime.Streams) (int, error)) *Client {
	t.Helper()
	return client(t, of(&fake{exec: func(ctx context.Context, id string, command runtime.Command, streams runtime.Streams) (int, error) {
		must.Eq(t, "s", id)
		return run(ctx, command, streams)
	}}))
}

var command = runtime.Command{
	Args: []string{"sh", "-c", "exit 3"}, Env: map[string]string{"A": "é", "B": ""}, Dir: "/srv", User: "nobody", Task: "main",
	TTY: true, Size: runtime.WindowSize{Rows: 24, Columns: 65535},
}

func TestExec(t *testing.T) {
	t.Run("carries the command and its exit code", func(t *testing.T) {
		for _, want := range []runtime.Command{command, {Args: []string{"true"}}} {
			c := execs(t, func(_ context.Context, got runtime.Command, _ runtime.Streams) (int, error) {
				must.Eq(t, want, got)
				return 137, nil
			})
			code, err := c.Exec(t.Context(), "s", want, runtime.Streams{})
			must.NoError(t, err)
			must.Eq(t, 137, code)
		}
	})
	t.Run("carries megabytes of each stream", func(t *testing.T) {
		long := bytes.Repeat([]byte("0123456789abcdef"), 256<<10) // 4 MiB
		c := execs(t, func(_ context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
			_, err := io.Copy(io.MultiWriter(streams.Stdout, streams.Stderr), streams.Stdin)
			return 0, err
		})
		var stdout, stderr bytes.Buffer
		_, err := c.Exec(t.Context(), "s", command, runtime.Streams{Stdin: bytes.NewReader(long), Stdout: &stdout, Stderr: &stderr})
		must.NoError(t, err)
		must.True(t, bytes.Equal(long, stdout.Bytes()))
		must.True(t, bytes.Equal(long, stderr.Bytes()))
	})
	t.Run("ends the input that is nil or fails", func(t *testing.T) {
		for _, stdin := range []io.Reader{nil, brokenStream{}} {
			c := execs(t, func(_ context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
				data, err := io.ReadAll(streams.Stdin)
				must.SliceEmpty(t, data)
				return 0, err
			})
			_, err := c.Exec(t.Context(), "s", command, runtime.Streams{Stdin: stdin})
			must.NoError(t, err)
		}
	})
	t.Run("passes sizes on while the input is silent, and after its end", func(t *testing.T) {
		want := runtime.WindowSize{Rows: 40, Columns: 120}
		silent, end := io.Pipe()
		defer end.Close()
		for _, stdin := range []io.Reader{silent, nil} {
			c := execs(t, func(_ context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
				must.Eq(t, want, <-streams.Resize)
				return 0, nil
			})
			resize := make(chan runtime.WindowSize, 1)
			resize <- want
			_, err := c.Exec(t.Context(), "s", command, runtime.Streams{Stdin: stdin, Resize: resize})
			must.NoError(t, err)
		}
	})
	t.Run("goes on if nobody reads sizes", func(t *testing.T) {
		resize := make(chan runtime.WindowSize)
		c := execs(t, func(_ context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
			for range 10 {
				resize <- runtime.WindowSize{Rows: 1, Columns: 1}
			}
			close(resize)
			_, err := io.WriteString(streams.Stdout, "done")
			return 0, err
		})
		var stdout strings.Builder
		_, err := c.Exec(t.Context(), "s", command, runtime.Streams{Stdout: &stdout, Resize: resize})
		must.NoError(t, err)
		must.Eq(t, "done", stdout.String())
	})
	t.Run("drops what a driver writes too late", func(t *testing.T) {
		returned := make(chan struct{})
		var late sync.WaitGroup
		c := execs(t, func(_ context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
			late.Go(func() {
				<-returned
				_, _ = streams.Stdout.Write([]byte("late")) // it may succeed or fail
			})
			return 0, nil
		})
		_, err := c.Exec(t.Context(), "s", command, runtime.Streams{Stdout: brokenStream{}})
		close(returned)
		late.Wait()
		must.NoError(t, err)
	})
	for _, want := range []error{runtime.ErrNotFound, runtime.ErrInvalid, errors.ErrUnsupported} {
		t.Run("carries the error "+want.Error(), func(t *testing.T) {
			c := execs(t, func(context.Context, runtime.Command, runtime.Streams) (int, error) {
				return 0, fmt.Errorf("%w: no such", want)
			})
			_, err := c.Exec(t.Context(), "s", command, runtime.Streams{})
			must.ErrorIs(t, err, want)
		})
	}
	t.Run("refuses an empty command", func(t *testing.T) {
		_, err := execs(t, nil).Exec(t.Context(), "s", runtime.Command{}, runtime.Streams{})
		must.ErrorIs(t, err, runtime.ErrInvalid)
	})
}

// The command's context ends, whatever it is that keeps the host from going on.
func TestExec_EndsTheCommandWithItsCaller(t *testing.T) {
	for _, test := range []struct {
		name    string
		streams func(cancel context.CancelFunc) runtime.Streams
		run     func(cancel context.CancelFunc, streams runtime.Streams)
		want    error
	}{
		{
			"the caller's context ends",
			func(context.CancelFunc) runtime.Streams { return runtime.Streams{} },
			func(cancel context.CancelFunc, _ runtime.Streams) { cancel() }, context.Canceled,
		},
		{
			"the caller does not read",
			func(cancel context.CancelFunc) runtime.Streams { return runtime.Streams{Stdout: lastWriter{cancel}} },
			func(_ context.CancelFunc, streams runtime.Streams) { writeAll(streams.Stdout) }, context.Canceled,
		},
		{
			"the command does not read",
			func(context.CancelFunc) runtime.Streams { return runtime.Streams{Stdin: endlessReader{}} },
			func(cancel context.CancelFunc, _ runtime.Streams) { cancel() }, context.Canceled,
		},
		{
			"the caller's writer fails",
			func(context.CancelFunc) runtime.Streams { return runtime.Streams{Stdout: brokenStream{}} },
			func(_ context.CancelFunc, streams runtime.Streams) { writeAll(streams.Stdout) }, errBrokenStream,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan struct{})
			c := execs(t, func(ctx context.Context, _ runtime.Command, streams runtime.Streams) (int, error) {
				defer close(ended)
				test.run(cancel, streams)
				<-ctx.Done()
				return 0, ctx.Err()
			})
			_, err := c.Exec(ctx, "s", command, test.streams(cancel))
			must.ErrorIs(t, err, test.want)
			<-ended
		})
	}
	t.Run("the deadline passes", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		ended := make(chan struct{})
		c := execs(t, func(run context.Context, _ runtime.Command, _ runtime.Streams) (int, error) {
			defer close(ended)
			<-run.Done()
			return 0, run.Err()
		})
		_, err := c.Exec(ctx, "s", command, runtime.Streams{})
		must.ErrorIs(t, err, context.DeadlineExceeded)
		<-ended
	})
}

var errBrokenStream = errors.New("broken stream")

type (
	brokenStream  struct{}                            // fails
	lastWriter    struct{ cancel context.CancelFunc } // calls cancel at its first write
	endlessReader struct{}
)

func (brokenStream) Read([]byte) (int, error)  { return 0, errBrokenStream }
func (brokenStream) Write([]byte) (int, error) { return 0, errBrokenStream }

func (w lastWriter) Write(data []byte) (int, error) {
	w.cancel()
	return len(data), nil
}

func (endlessReader) Read(data []byte) (int, error) { return len(data), nil }

// writeAll writes until it fails.
func writeAll(to io.Writer) {
	for data := make([]byte, maxChunk); ; {
		if _, err := to.Write(data); err != nil {
			return
		}
	}
}

// noExit runs commands that end without an exit code.
type noExit struct{ liar }

func (*noExit) Info(context.Context, *runtimev1.InfoRequest) (*runtimev1.InfoResponse, error) {
	return &runtimev1.InfoResponse{Name: "liar", Abilities: []string{"exec", "explain"}}, nil
}

func (*noExit) Exec(grpc.BidiStreamingServer[runtimev1.ExecRequest, runtimev1.ExecResponse]) error {
	return nil
}

func (*noExit) Explain(context.Context, *runtimev1.ExplainRequest) (*runtimev1.ExplainResponse, error) {
	answer := &runtimev1.ExplainResponse{}
	for range maxHappenings {
		answer.Happenings = append(answer.Happenings, &runtimev1.Happening{Text: "too old"})
	}
	for range maxHappenings {
		answer.Happenings = append(answer.Happenings, &runtimev1.Happening{Text: strings.Repeat("\n", maxHappening+1)})
	}
	return answer, nil
}

func TestExec_WithoutAnExitCodeIsRefused(t *testing.T) {
	_, err := client(t, &noExit{}).Exec(t.Context(), "s", command, runtime.Streams{})
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, "without an exit code")
}

func TestExplain(t *testing.T) {
	t.Run("carries what happened", func(t *testing.T) {
		want := []runtime.Happening{
			{Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Text: "started"}, {Text: "exit code 1: «voll»"},
		}
		c := client(t, of(&fake{explain: func(_ context.Context, id string) ([]runtime.Happening, error) {
			must.Eq(t, "s", id)
			return want, nil
		}}))
		got, err := c.Explain(t.Context(), "s")
		must.NoError(t, err)
		must.Eq(t, want, got)
	})
	t.Run("carries the newest", func(t *testing.T) {
		all := make([]runtime.Happening, maxHappenings+7)
		for i := range all {
			all[i].Text = fmt.Sprint(i)
		}
		c := client(t, of(&fake{explain: func(context.Context, string) ([]runtime.Happening, error) { return all, nil }}))
		got, err := c.Explain(t.Context(), "s")
		must.NoError(t, err)
		must.Eq(t, all[7:], got)
	})
	t.Run("carries an error", func(t *testing.T) {
		c := client(t, of(&fake{explain: func(context.Context, string) ([]runtime.Happening, error) { return nil, runtime.ErrNotFound }}))
		_, err := c.Explain(t.Context(), "s")
		must.ErrorIs(t, err, runtime.ErrNotFound)
	})
	t.Run("cuts what a plugin sends too much", func(t *testing.T) {
		got, err := client(t, &noExit{}).Explain(t.Context(), "s")
		must.NoError(t, err)
		must.Len(t, maxHappenings, got)
		for _, happening := range got {
			must.Eq(t, strings.Repeat(" ", maxHappening), happening.Text)
			must.True(t, happening.Time.IsZero())
		}
	})
}
