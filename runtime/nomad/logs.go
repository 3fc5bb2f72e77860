package nomad

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxLogReads bounds how many logs are read at a time. Each holds a connection for
	// as long as it lasts; see maxRequests.
	maxLogReads = 16
	// maxLogSilence is how long Nomad may be silent while it sends a log. It sends a
	// heartbeat every second.
	maxLogSilence = 10 * time.Second
	// startLag is how long after the start of a task its client may say that the task has
	// not started. The sandbox may be ready before that.
	startLag    = 3 * time.Second
	maxLogFrame = 1 << 20 // bytes of one message of a log; Nomad puts at most 64 KiB of output into one
	// checkEnd is how often the follower of a log checks whether the sandbox has ended.
	// It learns of it by an event before that, unless the event stream is interrupted.
	checkEnd = 5 * time.Second
)

var (
	errLogSilent    = fmt.Errorf("no heartbeat for %v", maxLogSilence)
	errSandboxEnded = errors.New("the sandbox has ended")
	errEnough       = errors.New("the reader has enough")
)

// Logs implements [runtime.LogReader].
//
// Nomad keeps a log in numbered files, and removes the oldest if there are too many. An
// offset counts a file that is complete as if it had the maximum size. So the offset of
// a byte never changes, even if older files are removed, and the offset of a file's last
// byte may be up to 32 KiB less than that of the next one.
//
// Nomad's own offsets change when it removes a file. So Logs reads all that Nomad keeps
// up to three times, whatever the offset. Keep max_files and max_file_size small.
func (d *Driver) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		err := d.readLog(ctx, sessionID, query, func(chunk runtime.LogChunk) error {
			if !yield(chunk, nil) {
				return errEnough
			}
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			yield(runtime.LogChunk{}, err)
		}
	}
}

func (d *Driver) readLog(ctx context.Context, sessionID string, query runtime.LogQuery, yield func(runtime.LogChunk) error) error {
	select {
	case d.logReads <- struct{}{}:
		defer func() { <-d.logReads }()
	default:
		return fmt.Errorf("nomad: %w: %d logs are being read already", runtime.ErrUnavailable, maxLogReads)
	}
	log, err := d.findLog(ctx, sessionID, query)
	if err != nil {
		return err
	}
	from := query.Offset
	if from < 0 || from > 0 && query.Follow {
		end, err := log.read(ctx, 0, false, func(runtime.LogChunk) error { return nil })
		if err != nil {
			return err
		}
		if from < 0 {
			from += end
		}
		from = max(0, min(from, end))
	}
	if query.Follow {
		return log.follow(ctx, from, yield)
	}
	_, err = log.read(ctx, from, false, yield)
	return err
}

// taskLog is one log of a sandbox.
type taskLog struct {
	driver   *Driver
	jobID    string
	allocID  string
	task     string
	stream   runtime.LogStream
	fileSize int64 // the maximum size of a file, in bytes
}

// findLog finds the log that a query selects.
func (d *Driver) findLog(ctx context.Context, sessionID string, query runtime.LogQuery) (taskLog, error) {
	if query.Stream != runtime.Stdout && query.Stream != runtime.Stderr {
		return taskLog{}, fmt.Errorf("nomad: %w: unknown stream %q (available: stdout, stderr)", runtime.ErrInvalid, query.Stream)
	}
	jobID := jobs.ID(sessionID)
	s, err := d.look(ctx, jobID)
	if err != nil {
		return taskLog{}, err
	}
	if err := d.notForeign(s); err != nil {
		return taskLog{}, err
	}
	alloc := s.sandboxAlloc()
	if !s.known || alloc == nil {
		return taskLog{}, fmt.Errorf("nomad: session %s: %w", sessionID, runtime.ErrNotFound)
	}
	task, err := d.findTask(ctx, jobID, query.Task)
	if err != nil {
		return taskLog{}, err
	}
	if task.LogConfig == nil {
		task.LogConfig = api.DefaultLogConfig()
	}
	task.LogConfig.Canonicalize()
	if *task.LogConfig.Disabled {
		return taskLog{}, logsDisabled(task.Name)
	}
	return taskLog{d, jobID, alloc.ID, task.Name, query.Stream, int64(*task.LogConfig.MaxFileSizeMB) << 20}, nil
}

func logsDisabled(task string) error {
	return fmt.Errorf("nomad: %w for task %q: set logs = true in the server's job_vars, or the logs block in your own job template; "+
		"it applies to sessions that are created after that", runtime.ErrLogsDisabled, task)
}

// findTask returns the named task of a job, or its first main task if name is empty.
func (d *Driver) findTask(ctx context.Context, jobID, name string) (*api.Task, error) {
	var job *api.Job
	err := d.ask(ctx, func(opts *api.QueryOptions) (err error) {
		job, _, err = d.client.Jobs().Info(jobID, opts)
		return err
	})
	switch {
	case isNotFound(err):
		return nil, fmt.Errorf("nomad: job %s: %w", jobID, runtime.ErrNotFound)
	case err != nil:
		return nil, failed(ctx, "read job "+jobID, err)
	}
	if mains := jobs.MainTasks(job.Meta); name == "" && len(mains) > 0 {
		name = mains[0]
	}
	var names []string
	for _, group := range job.TaskGroups {
		for _, task := range group.Tasks {
			if task.Name == name || name == "" {
				return task, nil
			}
			names = append(names, task.Name)
		}
	}
	return nil, fmt.Errorf("nomad: %w: unknown task %q (available: %s)", runtime.ErrInvalid, name, strings.Join(names, ", "))
}

// follow yields the log from an offset until the sandbox ends.
func (l taskLog) follow(ctx context.Context, from int64, yield func(runtime.LogChunk) error) error {
	following, stop := context.WithCancelCause(ctx)
	var watcher sync.WaitGroup
	defer watcher.Wait()
	defer stop(nil)
	watcher.Go(func() {
		if l.awaitEnd(following) == nil {
			stop(errSandboxEnded)
		}
	})
	next, err := l.read(following, from, true, yield)
	if errors.Is(err, errEnough) || ctx.Err() != nil || !errors.Is(context.Cause(following), errSandboxEnded) {
		return err
	}
	// Nomad may not have sent yet what the sandbox printed last.
	_, err = l.read(ctx, next, false, yield)
	if errors.Is(err, runtime.ErrNotFound) { // it was deleted in the meantime
		return nil
	}
	return err
}

// awaitEnd waits until the sandbox is dead or deleted.
func (l taskLog) awaitEnd(ctx context.Context) error {
	changed, done := l.driver.cache.await(l.jobID)
	defer done()
	for {
		if s, err := l.driver.look(ctx, l.jobID); err == nil {
			if sandbox, ok := l.driver.sandbox(s); !ok || sandbox.State == runtime.StateDead {
				return nil
			}
		}
		if !awaitNews(ctx, changed.C, checkEnd) {
			return ctx.Err()
		}
	}
}

// read yields the log from an offset to its end, or with follow until ctx ends. It
// returns the offset from which to continue, also with an error.
func (l taskLog) read(ctx context.Context, from int64, follow bool, yield func(runtime.LogChunk) error) (next int64, err error) {
	pause := backoff.Backoff{Min: 20 * time.Millisecond, Max: maxPause}
	for began := time.Now(); ; {
		err = l.driver.whileBusy(ctx, limits{}, func(ctx context.Context, token string) error {
			next, err = l.receive(ctx, token, from, follow, yield)
			return err
		})
		switch {
		case err == nil || errors.Is(err, errEnough):
			return next, err
		case !isNotStarted(err) || time.Since(began) >= startLag || backoff.Sleep(ctx, pause.Next()) != nil:
			return next, l.failed(ctx, err)
		}
	}
}

// isNotStarted reports whether Nomad has no log because the task has not started.
func isNotStarted(err error) bool {
	return isNotFound(err) && strings.Contains(bodyOf(err), "not started yet")
}

// isUnknownAlloc reports whether Nomad has no log because no client has the allocation.
func isUnknownAlloc(err error) bool {
	return isNotFound(err) && strings.Contains(strings.ToLower(bodyOf(err)), "unknown allocation")
}

// receive makes the request of read.
func (l taskLog) receive(ctx context.Context, token string, from int64, follow bool, yield func(runtime.LogChunk) error) (next int64, err error) {
	next = from
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(maxLogSilence, func() { cancel(errLogSilent) })
	defer silence.Stop()
	opts := (&api.QueryOptions{Namespace: l.driver.namespace, AuthToken: token}).WithContext(ctx)
	body, err := l.driver.client.Raw().Response("/v1/client/fs/logs/"+l.allocID+"?"+url.Values{
		"task": {l.task}, "type": {string(l.stream)}, "follow": {strconv.FormatBool(follow)},
	}.Encode(), opts)
	if err != nil {
		return next, cmp.Or(context.Cause(ctx), err)
	}
	defer body.Close()
	frames := newFrames(body, l.fileSize)
	for {
		silence.Reset(maxLogSilence)
		offset, data, err := frames.next()
		silence.Stop() // the reader may take its time
		switch {
		case errors.Is(err, io.EOF) && !follow:
			return next, nil
		case err != nil:
			return next, cmp.Or(context.Cause(ctx), err)
		}
		end := offset + int64(len(data))
		if end <= next { // a heartbeat, or what comes before the offset
			continue
		}
		data, offset, next = data[max(0, next-offset):], max(offset, next), end
		if err := yield(runtime.LogChunk{Stream: l.stream, Offset: offset, Data: data}); err != nil {
			return next, err
		}
	}
}

// failed returns the error of a failed read.
func (l taskLog) failed(ctx context.Context, err error) error {
	doing := "read the log of allocation " + l.allocID
	body := bodyOf(err)
	switch {
	case strings.HasPrefix(body, "log entry for task"):
		return logsDisabled(l.task) // by its driver's own configuration
	case isUnknownAlloc(err), isNotStarted(err):
		return fmt.Errorf("nomad: %w: %s", runtime.ErrNotFound, body)
	case strings.Contains(body, "Permission denied"): // with status 500
		return unfit(ctx, doing, fmt.Errorf("%w: %w", runtime.ErrPermission, err), needs("the capability read-logs in the namespace"))
	default:
		return failed(ctx, doing, err)
	}
}

// frames reads the messages of a log.
type frames struct {
	limit    *io.LimitedReader
	decoder  *json.Decoder
	fileSize int64
	file     string
	offset   int64 // of the next byte of file
}

func newFrames(body io.Reader, fileSize int64) *frames {
	limit := &io.LimitedReader{R: body}
	return &frames{limit: limit, decoder: json.NewDecoder(limit), fileSize: fileSize}
}

// next returns the output in the next message and the offset of its first byte. The
// output of a heartbeat is empty. Nomad also sends offsets within files, but not always
// the right ones.
func (f *frames) next() (offset int64, data []byte, err error) {
	f.limit.N = maxLogFrame
	var frame struct {
		File string
		Data []byte
	}
	if err := f.decoder.Decode(&frame); err != nil {
		return 0, nil, err
	}
	if len(frame.Data) > 0 && frame.File != f.file {
		number, err := strconv.ParseInt(frame.File[strings.LastIndexByte(frame.File, '.')+1:], 10, 32)
		if err != nil {
			return 0, nil, fmt.Errorf("unknown file %q in a log: %w", frame.File, err)
		}
		f.file, f.offset = frame.File, number*f.fileSize
	}
	offset = f.offset
	f.offset += int64(len(frame.Data))
	return offset, frame.Data, nil
}
