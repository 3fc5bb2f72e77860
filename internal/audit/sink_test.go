package audit_test

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/audit"
)

func settings(path string) audit.Settings {
	return audit.Settings{Name: "file", Path: path, Mode: 0o600, Enforced: true}
}

// open opens a sink until the test ends.
func open(t *testing.T, settings audit.Settings) *audit.Sink {
	t.Helper()
	sink, err := audit.Open(settings, nil)
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, sink.Close()) })
	return sink
}

// write writes the line of one operation.
func write(t *testing.T, sink *audit.Sink, n int) {
	t.Helper()
	_, err := newLog(sink).Begin(t.Context(), operation(n))
	must.NoError(t, err)
}

// read returns the request IDs of a file's lines, and "gap N" for a line that says that
// N are missing. All lines must be whole.
func read(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	must.NoError(t, err)
	return parse(t, string(text))
}

func parse(t *testing.T, text string) []string {
	t.Helper()
	var ids []string
	for line := range strings.Lines(text) {
		must.StrHasSuffix(t, "\n", line)
		var parsed struct {
			Payload struct {
				Stage   string
				Request struct{ ID string }
				Gap     struct{ Lost json.Number }
			}
		}
		must.NoError(t, json.Unmarshal([]byte(line), &parsed), must.Sprint(line))
		id := parsed.Payload.Request.ID
		if parsed.Payload.Stage == "Gap" {
			id = "gap " + parsed.Payload.Gap.Lost.String()
		}
		ids = append(ids, id)
	}
	return ids
}

func TestSink(t *testing.T) {
	t.Run("creates its file with the mode, whatever the umask is", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		s := settings(path)
		s.Mode = 0o666
		open(t, s)
		info, err := os.Stat(path)
		must.NoError(t, err)
		must.Eq(t, fs.FileMode(0o666), info.Mode())
	})

	t.Run("appends to a file and keeps its mode", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		write(t, open(t, settings(path)), 1)
		must.NoError(t, os.Chmod(path, 0o640))
		write(t, open(t, settings(path)), 2)
		must.Eq(t, []string{"1", "2"}, read(t, path))
		info, err := os.Stat(path)
		must.NoError(t, err)
		must.Eq(t, fs.FileMode(0o640), info.Mode())
	})

	t.Run("begins a new line after one that a killed process left", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		must.NoError(t, os.WriteFile(path, []byte(`{"created_at":`), 0o600))
		write(t, open(t, settings(path)), 1)
		text, err := os.ReadFile(path)
		must.NoError(t, err)
		_, rest, _ := strings.Cut(string(text), "\n")
		must.Eq(t, []string{"1"}, parse(t, rest))
	})

	t.Run("refuses what would block", func(t *testing.T) {
		pipe := filepath.Join(t.TempDir(), "pipe")
		must.NoError(t, unix.Mkfifo(pipe, 0o600))
		_, err := audit.Open(settings(pipe), nil)
		must.ErrorContains(t, err, `audit "file": `+pipe+" is neither a file nor a character device")
		_, err = audit.Open(settings(t.TempDir()), nil)
		must.ErrorContains(t, err, "is neither a file")
	})

	t.Run("refuses a folder that does not exist", func(t *testing.T) {
		_, err := audit.Open(settings("/does/not/exist/audit.log"), nil)
		must.ErrorIs(t, err, fs.ErrNotExist)
	})

	t.Run("lets two processes write to one file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		var writers sync.WaitGroup
		for range 2 {
			sink := open(t, settings(path))
			for range 4 {
				writers.Go(func() {
					for n := range 100 {
						write(t, sink, n)
					}
				})
			}
		}
		writers.Wait()
		must.Len(t, 800, read(t, path))
	})
}

func TestReload(t *testing.T) {
	reload := func(t *testing.T, sink *audit.Sink, want bool) {
		t.Helper()
		changed, err := sink.Reload()
		must.NoError(t, err)
		must.Eq(t, want, changed)
	}

	t.Run("opens a new file after the old one was renamed", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		sink := open(t, settings(path))
		write(t, sink, 1)
		reload(t, sink, false)
		must.NoError(t, os.Rename(path, path+".1"))
		write(t, sink, 2) // nobody has told it yet
		reload(t, sink, true)
		write(t, sink, 3)
		must.Eq(t, []string{"1", "2"}, read(t, path+".1"))
		must.Eq(t, []string{"3"}, read(t, path))
	})

	t.Run("opens the file that logrotate created", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		sink := open(t, settings(path))
		must.NoError(t, os.Rename(path, path+".1"))
		must.NoError(t, os.WriteFile(path, nil, 0o640))
		reload(t, sink, true)
		write(t, sink, 1)
		must.Eq(t, []string{"1"}, read(t, path))
	})

	t.Run("loses no line while others write", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		sink := open(t, settings(path))
		var writers sync.WaitGroup
		writers.Go(func() {
			for n := range 500 {
				write(t, sink, n)
			}
		})
		for n := range 20 {
			must.NoError(t, os.Rename(path, path+"."+string(rune('a'+n))))
			reload(t, sink, true)
		}
		writers.Wait()
		files, err := filepath.Glob(path + "*")
		must.NoError(t, err)
		must.Len(t, 21, files)
		lines := 0
		for _, file := range files {
			lines += len(read(t, file))
		}
		must.Eq(t, 500, lines)
	})

	t.Run("goes on with the old file if the new one cannot be opened", func(t *testing.T) {
		folder := filepath.Join(t.TempDir(), "folder")
		must.NoError(t, os.Mkdir(folder, 0o700))
		path := filepath.Join(folder, "audit.log")
		sink := open(t, settings(path))
		must.NoError(t, os.Rename(folder, folder+".1"))
		_, err := sink.Reload()
		must.ErrorIs(t, err, fs.ErrNotExist)
		write(t, sink, 1)
		must.Eq(t, []string{"1"}, read(t, filepath.Join(folder+".1", "audit.log")))
	})

	t.Run("leaves standard output alone", func(t *testing.T) {
		var out bytes.Buffer
		sink, err := audit.Open(audit.Settings{Name: "out", Path: audit.Stdout}, &out)
		must.NoError(t, err)
		reload(t, sink, false)
		write(t, sink, 1)
		must.Eq(t, []string{"1"}, parse(t, out.String()))
		must.NoError(t, sink.Close())
	})
}

// again runs this program for a test that needs a process of its own.
func again(t *testing.T, path, limit string) *exec.Cmd {
	t.Helper()
	program, err := os.Executable()
	must.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Env = append(os.Environ(), "TEST_AUDIT_FILE="+path, "TEST_FILE_LIMIT="+limit)
	cmd.Stderr = os.Stderr
	return cmd
}

func TestFileThatMayNotGrow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	must.NoError(t, again(t, path, "1000").Run())

	full := read(t, path+".full")
	must.Between(t, 2, len(full), 4, must.Sprint("whole lines only"))
	after := read(t, path)
	must.Eq(t, full, after[:len(full)])
	must.Eq(t, "gap 1", after[len(full)])
	must.Len(t, len(full)+2, after)
}

func TestKilledProcessLeavesWholeLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	for range 5 {
		before := size(path)
		writer := again(t, path, "")
		must.NoError(t, writer.Start())
		must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool { return size(path) > before+10_000 })))
		must.NoError(t, writer.Process.Signal(syscall.SIGKILL))
		must.Error(t, writer.Wait())
		text, err := os.ReadFile(path)
		must.NoError(t, err)
		// The kernel may end a write between two pages, but nearly never does. The next
		// line then begins after it, see TestSink.
		whole := text[:bytes.LastIndexByte(text, '\n')+1]
		must.SliceNotEmpty(t, parse(t, string(whole)))
		must.NoError(t, os.Truncate(path, int64(len(whole))))
	}
}

func size(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}
