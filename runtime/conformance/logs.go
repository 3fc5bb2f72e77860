package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

func requirementsOfLogs() []requirement {
	return []requirement{
		{"keeps what a sandbox prints", "Logs yields all lines of a stream in order, until the sandbox is deleted", needsDemoToPrint, keepsOutput},
		{"reads output from an offset", "Logs begins at an offset from the beginning or the end, or else at the nearest end", needsDemoToPrint, readsFromOffsets},
		{"follows what a sandbox prints", "Logs with Follow yields new output until the sandbox ends", needsDemoToPrint, followsOutput},
		{"follows only while somebody reads", "Logs with Follow ends within a second after its context", needsDemoToPrint, stopsToFollow},
		{"has no output of the unknown", "Logs of an unknown ID returns ErrNotFound", nothing, hasNoOutput},
	}
}

const errNoLogs = notApplicableError("the driver has no Logs, which it need not have")

// logs passes what Logs yields to each until that returns false, and returns Logs' error.
// It may be called from any goroutine.
func (f *fixture) logs(ctx context.Context, sessionID string, query runtime.LogQuery, each func(runtime.LogChunk) bool) error {
	reader, ok := f.driver.(runtime.LogReader)
	if !ok {
		return errNoLogs
	}
	for chunk, err := range reader.Logs(ctx, sessionID, query) {
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			return errNoLogs
		case errors.Is(err, runtime.ErrLogsDisabled):
			return notApplicableError("the driver keeps no output: " + err.Error())
		case err != nil:
			return err
		}
		if !each(chunk) {
			return nil
		}
	}
	return nil
}

// output returns what is kept of a stream.
func (f *fixture) output(spec runtime.Spec, stream runtime.LogStream, offset int64) string {
	var text bytes.Buffer
	first := int64(-1)
	err := f.logs(f.patience(), spec.SessionID, runtime.LogQuery{Stream: stream, Offset: offset}, func(chunk runtime.LogChunk) bool {
		if first < 0 {
			first = chunk.Offset
		}
		same(f, stream, chunk.Stream, "the stream of output that Logs yields")
		same(f, first+int64(text.Len()), chunk.Offset, "the offset of output that Logs yields")
		text.Write(chunk.Data)
		return true
	})
	f.noError(err, "Logs")
	f.require(offset != 0 || first <= 0, "Logs from the beginning begins at the offset %d", first)
	return text.String()
}

// print has a demo sandbox print something.
func (f *fixture) print(spec runtime.Spec, sandbox runtime.Sandbox, stream runtime.LogStream, text string) {
	status, _, err := f.send(http.MethodPost, sandbox, "/print?stream="+string(stream), text, spec.AccessToken)
	f.noError(err, "have the sandbox print")
	same(f, http.StatusOK, status, "the status of the sandbox's answer to /print")
}

// keepsOutput has a sandbox print lines on both streams by turns. A sandbox may print
// other lines by itself, and a driver need not tell the streams apart.
func keepsOutput(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	mark := uuid.NewString()
	printed := map[runtime.LogStream][]string{}
	for range 10 {
		for _, stream := range []runtime.LogStream{runtime.Stdout, runtime.Stderr} {
			var block []string
			for i := range 100 {
				block = append(block, fmt.Sprintf("%s %s %d", mark, stream, len(printed[stream])+i))
			}
			printed[stream] = append(printed[stream], block...)
			f.print(spec, sandbox, stream, strings.Join(block, "\n")+"\n")
		}
	}
	lines := func(stream, of runtime.LogStream) []string {
		return slices.DeleteFunc(strings.Split(f.output(spec, stream, 0), "\n"), func(line string) bool {
			return !strings.HasPrefix(line, mark+" "+string(of)+" ")
		})
	}
	areKept := func() bool {
		return slices.Equal(printed[runtime.Stdout], lines(runtime.Stdout, runtime.Stdout)) && len(lines(runtime.Stderr, runtime.Stdout)) == 0 &&
			(slices.Equal(printed[runtime.Stderr], lines(runtime.Stderr, runtime.Stderr)) && len(lines(runtime.Stdout, runtime.Stderr)) == 0 ||
				slices.Equal(printed[runtime.Stderr], lines(runtime.Stdout, runtime.Stderr)) && len(lines(runtime.Stderr, runtime.Stderr)) == 0)
	}
	f.eventually(f.soon(), "Logs to yield what a sandbox printed, each line once and in order", areKept)
	f.stop(spec)
	f.eventually(f.soon(), "Logs to yield what a stopped sandbox had printed", areKept)
}

func readsFromOffsets(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	mark := uuid.NewString()
	f.print(spec, sandbox, runtime.Stdout, strings.Repeat("0123456789\n", 100)+mark+"\n")
	var all string
	f.eventually(f.soon(), "Logs to yield what a sandbox printed", func() bool {
		all = f.output(spec, runtime.Stdout, 0)
		return strings.Contains(all, mark)
	})
	size := int64(len(all))
	for _, offset := range []int64{1, 500, size - 1, size, size + 1000, -1, -500, -size, -size - 1000} {
		begin := offset
		if offset < 0 {
			begin += size
		}
		begin = min(max(begin, 0), size)
		same(f, all[begin:], f.output(spec, runtime.Stdout, offset), fmt.Sprintf("the output from the offset %d of %d", offset, size))
	}
}

// follower reads the output of a sandbox in the background.
type follower struct {
	f      *fixture
	chunks chan string
	ended  chan error
}

func (f *fixture) follow(ctx context.Context, spec runtime.Spec) follower {
	to := follower{f, make(chan string, 1000), make(chan error, 1)}
	go func() {
		to.ended <- f.logs(ctx, spec.SessionID, runtime.LogQuery{Stream: runtime.Stdout, Follow: true}, func(chunk runtime.LogChunk) bool {
			select {
			case to.chunks <- string(chunk.Data):
				return true
			case <-ctx.Done():
				return true // the driver must notice it by itself
			}
		})
	}()
	return to
}

// await waits until the output contains want.
func (to follower) await(want string) {
	late := time.NewTimer(to.f.soon())
	defer late.Stop()
	for text := ""; !strings.Contains(text, want); {
		select {
		case chunk := <-to.chunks:
			text += chunk
		case err := <-to.ended:
			to.f.noError(err, "Logs with Follow")
			to.f.require(false, "Logs with Follow ended while the sandbox runs")
		case <-late.C:
			to.f.require(false, "Logs with Follow does not yield what the sandbox prints")
		}
	}
}

// end waits until Logs has ended, and returns its error.
func (to follower) end(after string) error {
	late := time.NewTimer(to.f.soon())
	defer late.Stop()
	select {
	case err := <-to.ended:
		return err
	case <-late.C:
		to.f.require(false, "Logs with Follow does not end within %s after %s", to.f.soon(), after)
		return nil
	}
}

func followsOutput(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	before, after := uuid.NewString(), uuid.NewString()
	f.print(spec, sandbox, runtime.Stdout, before+"\n")
	ctx, cancel := context.WithCancel(f.patience())
	defer cancel()
	to := f.follow(ctx, spec)
	to.await(before)
	f.print(spec, sandbox, runtime.Stdout, after+"\n")
	to.await(after)
	f.kill(spec, sandbox)
	f.eventuallyDead(spec)
	f.noError(to.end("the sandbox"), "Logs with Follow of a sandbox that ended")
}

func stopsToFollow(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	mark := uuid.NewString()
	f.print(spec, sandbox, runtime.Stdout, mark+"\n")
	ctx, cancel := context.WithCancel(f.patience())
	defer cancel()
	to := f.follow(ctx, spec)
	to.await(mark)
	cancel()
	if err := to.end("its context"); err != nil {
		f.isError(err, context.Canceled, "Logs with Follow whose context ended")
	}
}

func hasNoOutput(f *fixture) {
	spec := f.spec()
	f.create(spec)
	for _, unknown := range []string{uuid.NewString(), neighbour(spec.SessionID)} {
		err := f.logs(f.patience(), unknown, runtime.LogQuery{Stream: runtime.Stdout}, func(runtime.LogChunk) bool { return true })
		if _, skipped := errors.AsType[notApplicableError](err); skipped {
			f.fail(err)
		}
		f.isError(err, runtime.ErrNotFound, "Logs of an unknown ID")
	}
}
