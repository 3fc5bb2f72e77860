package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

const (
	cutEvery  = 5 * time.Second        // how often logs are cut
	readEvery = 100 * time.Millisecond // how often a follower looks for new output
	maxLog    = 1 << 20                // bytes of a log that are kept when it is cut
	maxChunk  = 32 << 10               // bytes that are read at a time
)

// log is one output stream of a sandbox. The sandbox appends to a file, and the driver
// frees the space of the oldest bytes. Offsets count from the first byte that the
// sandbox has printed.
type log struct {
	name string // of the file

	mu     sync.Mutex // held while the file is read or cut
	begin  int64      // offset of the file's first byte; 0 if the file was never emptied
	oldest int64      // offset of the oldest byte that is kept
}

func newLogs(sessionID string) map[runtime.LogStream]*log {
	logs := map[runtime.LogStream]*log{}
	for _, stream := range []runtime.LogStream{runtime.Stdout, runtime.Stderr} {
		logs[stream] = &log{name: logName(sessionID, stream)}
	}
	return logs
}

func logName(sessionID string, stream runtime.LogStream) string {
	return sessionID + "." + string(stream) + logExt
}

// removeLogs removes a sandbox's logs. Those who read them may finish.
func removeLogs(folder *os.Root, sessionID string) error {
	var errs []error
	for _, log := range newLogs(sessionID) {
		errs = append(errs, remove(folder, log.name))
	}
	return errors.Join(errs...)
}

// cutLogs cuts all logs again and again, until the driver is closed.
func (d *Driver) cutLogs() {
	look := time.NewTicker(cutEvery)
	defer look.Stop()
	for {
		select {
		case <-d.closing:
			return
		case <-look.C:
			for _, sb := range d.snapshot() {
				for _, log := range sb.logs {
					if err := d.cut(log); err != nil {
						d.log.Warn("sandbox_log_not_cut", "session_id", sb.spec.SessionID, "error", err)
					}
				}
			}
		}
	}
}

// cut drops all but the last maxLog bytes of a log. If the file system cannot free the
// space of a file's beginning, cut empties the file. The sandbox opened it for
// appending, so it continues at the beginning.
func (d *Driver) cut(l *log) (err error) {
	file, err := d.folder.OpenFile(l.name, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // not started yet, or deleted
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	l.mu.Lock()
	defer l.mu.Unlock()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	end := l.begin + info.Size()
	if end-l.oldest <= maxLog {
		return nil
	}
	if err := freeBeginning(file, end-maxLog-l.begin); err == nil {
		l.oldest = end - maxLog
		return nil
	}
	if err := file.Truncate(0); err != nil {
		return err
	}
	l.begin, l.oldest = end, end
	return nil
}

// end returns the offset of the next byte that the sandbox prints.
func (l *log) end(file *os.File) (int64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	info, err := file.Stat()
	if err != nil {
		return 0, err
	}
	return l.begin + info.Size(), nil
}

// read reads what is kept from an offset on into buf. It returns the offset of the first
// byte, and no bytes at the end of the log.
func (l *log) read(file *os.File, offset int64, buf []byte) (begin int64, data []byte, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	offset = max(offset, l.oldest)
	n, err := file.ReadAt(buf, offset-l.begin)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return offset, buf[:n], err
}

// Logs implements [runtime.LogReader]. Offsets count from the first byte that the
// sandbox has printed, so the offset of a byte does not change when older ones are
// dropped.
func (d *Driver) Logs(ctx context.Context, sessionID string, query runtime.LogQuery) iter.Seq2[runtime.LogChunk, error] {
	return func(yield func(runtime.LogChunk, error) bool) {
		if err := d.readLog(ctx, sessionID, query, yield); err != nil {
			yield(runtime.LogChunk{}, fmt.Errorf("process: logs of %s: %w", sessionID, err))
		}
	}
}

// readLog returns an error that is to be yielded.
func (d *Driver) readLog(ctx context.Context, sessionID string, query runtime.LogQuery, yield func(runtime.LogChunk, error) bool) error {
	d.mu.Lock()
	sb, ok := d.sandboxes[sessionID]
	d.mu.Unlock()
	if !ok {
		return runtime.ErrNotFound
	}
	log, ok := sb.logs[query.Stream]
	if !ok {
		return fmt.Errorf("%w: unknown stream %q (available: stdout, stderr)", runtime.ErrInvalid, query.Stream)
	}
	if query.Task != "" {
		return fmt.Errorf("%w: unknown task %q: a sandbox has only one, without a name", runtime.ErrInvalid, query.Task)
	}
	file, err := d.folder.Open(log.name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: it has not been started", runtime.ErrNotFound)
	case err != nil:
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	defer func() { _ = file.Close() }() // it was only read from
	end, err := log.end(file)
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	next := min(query.Offset, end)
	if next < 0 {
		next = max(0, end+next)
	}
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	buf := make([]byte, maxChunk)
	for ended := false; ctx.Err() == nil; {
		if !query.Follow {
			buf = buf[:min(int64(maxChunk), max(0, end-next))]
		}
		begin, data, err := log.read(file, next, buf)
		if err != nil {
			return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
		}
		next = begin + int64(len(data))
		switch {
		case len(data) > 0:
			if !yield(runtime.LogChunk{Stream: query.Stream, Offset: begin, Data: data}, nil) {
				return nil
			}
			continue
		case !query.Follow || ended:
			return nil
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-sb.running.Done():
			ended = true // and read once more
		}
	}
	return ctx.Err()
}

// lastWords returns the last line that the sandbox printed, for an error message. It
// returns "" if there is none.
func (d *Driver) lastWords(ctx context.Context, sb *sandbox) string {
	for _, stream := range []runtime.LogStream{runtime.Stderr, runtime.Stdout} {
		var text []byte
		query := runtime.LogQuery{Stream: stream, Offset: -500}
		_ = d.readLog(context.WithoutCancel(ctx), sb.spec.SessionID, query, func(chunk runtime.LogChunk, _ error) bool { // fails if there is none
			text = append(text, chunk.Data...)
			return true
		})
		lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(text), "")), "\n")
		if last := lines[len(lines)-1]; last != "" {
			return last
		}
	}
	return ""
}
