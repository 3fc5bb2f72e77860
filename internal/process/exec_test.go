package process

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/exectest"
	"github.com/bivouac/bivouac/runtime"
)

func TestExec(t *testing.T) {
	d := openDriver(t, t.TempDir())
	newSandbox := func(t *testing.T) runtime.Spec {
		spec := newSpec(t, d)
		_, err := d.Create(t.Context(), spec, ignore)
		must.NoError(t, err)
		return spec
	}
	spec := newSandbox(t)
	exectest.Run(t, exectest.Harness{
		Driver: d, SessionID: spec.SessionID, HomeDir: spec.VolumeHostPath, Output: 100,
		NewSandbox: func(t *testing.T) string { return newSandbox(t).SessionID },
	})
}

// TestExecCopiesAllOfAPipe covers a command that fills the pipe while it is read and then
// exits. Something that it left in the background holds the pipe open.
func TestExecCopiesAllOfAPipe(t *testing.T) {
	from, into, err := os.Pipe()
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, errors.Join(from.Close(), into.Close())) })
	const lastWrite = "the end"
	_, err = into.Write(make([]byte, maxLastOutput))
	must.NoError(t, err)
	exited := make(chan struct{})
	var copied []byte
	reader := writerFunc(func(p []byte) (int, error) {
		if len(copied) == 0 { // there is room for more now
			_, err := io.WriteString(into, lastWrite)
			must.NoError(t, err)
			close(exited)
		}
		copied = append(copied, p...)
		return len(p), nil
	})
	must.NoError(t, output{from, reader}.copy(exited))
	must.Eq(t, maxLastOutput+len(lastWrite), len(copied))
	must.StrHasSuffix(t, lastWrite, string(copied))
}

// TestExecReadsWhatIsThere covers a machine so busy that the time for the last output is
// over before it is read.
func TestExecReadsWhatIsThere(t *testing.T) {
	from, into, err := os.Pipe()
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, errors.Join(from.Close(), into.Close())) })
	_, err = io.WriteString(into, "late")
	must.NoError(t, err)
	must.NoError(t, from.SetReadDeadline(time.Unix(1, 0)))
	out, buf := output{from: from}, make([]byte, 10)
	must.Eq(t, len("late"), out.readNow(buf))
	must.Eq(t, 0, out.readNow(buf))
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestExecEndsWithTheServer(t *testing.T) {
	marker, dir := exectest.NewMarker(), t.TempDir()
	server := exec.CommandContext(t.Context(), os.Args[0])
	server.Env = append(os.Environ(), "TEST_DIR="+dir, "TEST_SESSION_ID="+uuid.NewString(), "TEST_EXEC="+marker)
	server.Stderr = os.Stderr
	out, err := server.StdoutPipe()
	must.NoError(t, err)
	must.NoError(t, server.Start())
	_, err = io.ReadFull(out, make([]byte, len("started\n")))
	must.NoError(t, err)
	exectest.AwaitRunning(t, marker, 1)
	must.NoError(t, server.Process.Kill())
	_ = server.Wait() // it was killed
	exectest.AwaitGone(t, marker)
	must.NoError(t, EndLeftovers(t.Context(), dir))
}
