package examples_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime"
)

// killedClaims is how often a plugin is killed in a claim.
const killedClaims = 10

// makeSpare makes a spare, and deletes it at the end of the test.
func makeSpare(t *testing.T, p *pluginhost.Running) runtime.Spec {
	t.Helper()
	spare := createSpare(t, p.Driver)
	t.Cleanup(func() { must.NoError(t, p.Driver.Delete(context.Background(), spare.SessionID)) })
	return spare
}

func createSpare(t *testing.T, driver runtime.Driver) runtime.Spec {
	t.Helper()
	now := time.Now()
	spare := runtime.Spec{SessionID: uuid.NewString(), Pool: "small", CreatedAt: now, ExpiresAt: now.Add(time.Hour)}
	made, err := driver.Create(t.Context(), spare, ignore)
	must.NoError(t, err)
	must.Eq(t, "small", made.Pool)
	return spare
}

// forChat is the spec of a claim.
func forChat(spare runtime.Spec, volume string) runtime.Spec {
	spec := newSpec(volume)
	spec.SessionID = spare.SessionID
	return spec
}

// runIn runs a command in a sandbox and returns its exit code and output.
func runIn(t *testing.T, driver runtime.Execer, sessionID string, command ...string) (int, string) {
	t.Helper()
	var out bytes.Buffer
	code, err := driver.Exec(t.Context(), sessionID, runtime.Command{Args: command}, runtime.Streams{Stdout: &out, Stderr: &out})
	must.NoError(t, err)
	return code, strings.TrimSpace(out.String())
}

// claimsSpares: a spare gets the volume of its chat, and is otherwise as it was.
func (e example) claimsSpares(t *testing.T) {
	stack.NeedShell(t)
	p := start(t, e.plugin, instance)
	spare := makeSpare(t, p)
	volume := t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(volume, "note.txt"), []byte("hello"), 0o600))
	spec := forChat(spare, volume)
	const session = "/run/bivouac/session.json"

	code, out := runIn(t, p.Driver, spec.SessionID, "sh", "-c", "ls /workspace; test -e "+session)
	must.Eq(t, 1, code, must.Sprint("a spare has a session file"))
	must.Eq(t, "", out)

	began := time.Now()
	claimed, err := p.Driver.Claim(t.Context(), spec)
	must.NoError(t, err)
	t.Logf("%s: a claim took %s", e.plugin.Name, time.Since(began).Round(10*time.Microsecond))
	must.Eq(t, spec.ChatID, claimed.ChatID)

	_, out = runIn(t, p.Driver, spec.SessionID, "cat", "/workspace/note.txt")
	must.Eq(t, "hello", out)
	_, out = runIn(t, p.Driver, spec.SessionID, "sh", "-c", "echo from inside >/workspace/new.txt; cat "+session)
	var told map[string]string
	must.NoError(t, json.Unmarshal([]byte(out), &told))
	must.Eq(t, map[string]string{"session_id": spec.SessionID, "chat_id": spec.ChatID, "agent_id": spec.AgentID}, told)
	text, err := os.ReadFile(filepath.Join(volume, "new.txt"))
	must.NoError(t, err)
	must.Eq(t, "from inside\n", string(text))

	t.Run("and cannot change its mounts", func(t *testing.T) {
		for _, command := range []string{
			"echo x >" + session, "busybox rm " + session, "busybox umount /run/bivouac", "busybox umount -l /workspace", "echo x >/x",
		} {
			code, out := runIn(t, p.Driver, spec.SessionID, "sh", "-c", command)
			must.NotEq(t, 0, code, must.Sprint(command))
			must.NotEq(t, 127, code, must.Sprint(out)) // there is no such command
		}
	})
	t.Run("and mounts nothing on the host", func(t *testing.T) {
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		must.NoError(t, err)
		must.StrNotContains(t, string(mounts), volume)
	})
	t.Run("once, even if it is repeated after a crash", func(t *testing.T) {
		must.NoError(t, p.Restart(t.Context()))
		again, err := p.Driver.Claim(t.Context(), spec)
		must.NoError(t, err)
		must.Eq(t, claimed, again)
		_, out := runIn(t, p.Driver, spec.SessionID, "cat", "/proc/1/mounts")
		must.Eq(t, 2, strings.Count(out, " /workspace "), must.Sprint(out)) // its own, and the volume
		must.Eq(t, 2, strings.Count(out, " /run/bivouac "), must.Sprint(out))
	})
	t.Run("for one chat", func(t *testing.T) {
		other := t.TempDir()
		_, err := p.Driver.Claim(t.Context(), forChat(spare, other))
		must.ErrorIs(t, err, runtime.ErrConflict)
		_, out := runIn(t, p.Driver, spec.SessionID, "cat", "/workspace/note.txt")
		must.Eq(t, "hello", out)
	})
	t.Run("and deletes them without the files of the volume", func(t *testing.T) {
		must.NoError(t, p.Driver.Delete(t.Context(), spec.SessionID))
		left, err := e.left(t.Context(), spec.SessionID)
		must.NoError(t, err)
		must.SliceEmpty(t, left)
		must.StrNotContains(t, strings.Join(e.marks(t, instance), " "), spec.SessionID+".claimed")
		must.FileExists(t, filepath.Join(volume, "note.txt"))
		must.FileExists(t, filepath.Join(volume, "new.txt"))
		_, err = p.Driver.Claim(t.Context(), spec)
		must.Error(t, err)
	})
}

// isKilledInClaims: given a plugin that is killed in a claim, earlier or later, the next
// process gives the spare to one chat only, and a delete leaves nothing.
func (e example) isKilledInClaims(t *testing.T) {
	const whole = 50 * time.Millisecond // that a claim takes, about
	killed := 0
	for n := range killedClaims {
		p := start(t, e.plugin, instance)
		spare := createSpare(t, p.Driver)
		first, second := forChat(spare, t.TempDir()), forChat(spare, t.TempDir())
		err := killDuring(p, whole*time.Duration(n)/killedClaims, func() error {
			_, err := p.Driver.Claim(t.Context(), first)
			return err
		})
		if err != nil { // the claim was not quicker
			killed++
		}
		p.End()
		driver := start(t, e.plugin, instance).Driver
		_, firstErr := driver.Claim(t.Context(), first)
		_, secondErr := driver.Claim(t.Context(), second)
		must.NoError(t, firstErr)
		must.ErrorIs(t, secondErr, runtime.ErrConflict)
		must.NoError(t, driver.Delete(t.Context(), spare.SessionID))
		left, err := e.left(t.Context(), spare.SessionID)
		must.NoError(t, err)
		must.SliceEmpty(t, left)
		must.StrNotContains(t, strings.Join(e.marks(t, instance), " "), spare.SessionID+".claimed")
	}
	t.Logf("%s: killed in the middle of %d of %d claims", e.plugin.Name, killed, killedClaims)
}

// refusesVolumes: a spare does not get what can never be its workspace.
func (e example) refusesVolumes(t *testing.T) {
	p := start(t, e.plugin, instance)
	folder := t.TempDir()
	file := filepath.Join(folder, "file")
	must.NoError(t, os.WriteFile(file, nil, 0o600))
	for name, volume := range map[string]string{"a file": file, "nothing": filepath.Join(folder, "missing")} {
		t.Run(name, func(t *testing.T) {
			_, err := p.Driver.Claim(t.Context(), forChat(makeSpare(t, p), volume))
			must.ErrorIs(t, err, runtime.ErrInvalid)
		})
	}
}

// makesNoSparesThatItCannotBind: a plugin without the right to mount makes no spares, and
// all other sandboxes.
func (e example) makesNoSparesThatItCannotBind(t *testing.T) {
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("needs setpriv, to run the plugin with fewer rights: ", err)
	}
	weak := e.plugin
	weak.Path, weak.Args = setpriv, []string{"--bounding-set=-sys_admin", "--inh-caps=-sys_admin", e.plugin.Path}
	driver := start(t, weak, instance).Driver
	spare := runtime.Spec{SessionID: uuid.NewString(), Pool: "small"}
	_, err = driver.Create(t.Context(), spare, ignore)
	must.ErrorIs(t, err, runtime.ErrInvalid)
	must.ErrorContains(t, err, "it must run as root on the engine's machine")
	must.NoError(t, driver.Delete(t.Context(), spare.SessionID))

	spec := newSpec(t.TempDir())
	_, err = driver.Create(t.Context(), spec, ignore)
	must.NoError(t, err)
	must.NoError(t, driver.Delete(t.Context(), spec.SessionID))
}
