package process

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// newSpare starts a spare, and returns it with the spec of a chat that may claim it.
func newSpare(t *testing.T, d *Driver) (runtime.Sandbox, runtime.Spec) {
	t.Helper()
	claim := newSpec(t, d)
	claim.AccessToken = runtime.Secret(strings.Repeat("5ec2e7ab", 8))
	claim.CreatedAt, claim.ExpiresAt = time.Unix(2, 0), time.Unix(3, 0)
	spare, err := d.Create(t.Context(), runtime.Spec{
		SessionID: claim.SessionID, Pool: "pool", AccessToken: claim.AccessToken, CreatedAt: time.Unix(1, 0),
	}, ignore)
	must.NoError(t, err)
	return spare, claim
}

// run returns the output of a shell script in a sandbox.
func run(t *testing.T, d *Driver, sessionID, script string) string {
	t.Helper()
	var out bytes.Buffer
	code, err := d.Exec(t.Context(), sessionID, runtime.Command{Args: []string{"/bin/sh", "-c", script}}, runtime.Streams{Stdout: &out, Stderr: &out})
	must.NoError(t, err)
	must.Eq(t, 0, code, must.Sprint(out.String()))
	return out.String()
}

func TestClaim(t *testing.T) {
	d := openDriver(t, t.TempDir())
	spare, claim := newSpare(t, d)
	must.Eq(t, "pool", spare.Pool)
	must.Eq(t, "", spare.ChatID)
	before := run(t, d, spare.SessionID, "env | grep -v -e BIVOUAC_EXEC -e PWD | sort; ls $BIVOUAC_WORKSPACE; test ! -e $BIVOUAC_SESSION_FILE")
	must.StrNotContains(t, before, "BIVOUAC_CHAT_ID")
	must.StrNotContains(t, before, "BIVOUAC_AGENT_ID")

	want := spare
	want.ChatID, want.AgentID, want.VolumeHostPath = claim.ChatID, claim.AgentID, claim.VolumeHostPath
	want.CreatedAt, want.ExpiresAt = claim.CreatedAt, claim.ExpiresAt
	for range 2 {
		claimed, err := d.Claim(t.Context(), claim)
		must.NoError(t, err)
		must.Eq(t, want, claimed)
	}
	seen, err := d.Inspect(t.Context(), claim.SessionID)
	must.NoError(t, err)
	must.Eq(t, want, seen)
	found, err := d.FindChat(t.Context(), claim.ChatID, "")
	must.NoError(t, err)
	must.Eq(t, []runtime.Sandbox{want}, found)

	// The environment is the same, and what it names has changed.
	must.NoError(t, os.WriteFile(filepath.Join(claim.VolumeHostPath, "notes.txt"), []byte("hello"), 0o600))
	must.Eq(t, before, run(t, d, claim.SessionID, "env | grep -v -e BIVOUAC_EXEC -e PWD | sort"))
	must.Eq(t, "hello", run(t, d, claim.SessionID, "cat $BIVOUAC_WORKSPACE/notes.txt"))
	must.Eq(t, claim.VolumeHostPath+"\n", run(t, d, claim.SessionID, "pwd -P"))
	var session map[string]string
	must.NoError(t, json.Unmarshal([]byte(run(t, d, claim.SessionID, "cat $BIVOUAC_SESSION_FILE")), &session))
	must.Eq(t, map[string]string{"session_id": claim.SessionID, "chat_id": claim.ChatID, "agent_id": claim.AgentID}, session)
	explains(t, d, claim.SessionID, "process ", "it answers ", "claimed by chat "+claim.ChatID, "readiness check: it answers")

	// It is the chat's alone, and Delete leaves nothing but the volume.
	other := claim
	other.ChatID = uuid.NewString()
	_, err = d.Claim(t.Context(), other)
	must.ErrorIs(t, err, runtime.ErrConflict)
	_, err = d.Create(t.Context(), claim, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)
	must.NoError(t, d.Delete(t.Context(), claim.SessionID))
	must.SliceEmpty(t, files(t, d.dir, "*"))
	text, err := os.ReadFile(filepath.Join(claim.VolumeHostPath, "notes.txt"))
	must.NoError(t, err)
	must.Eq(t, "hello", string(text))
}

func TestClaimRefuses(t *testing.T) {
	d := openDriver(t, t.TempDir())
	file := filepath.Join(t.TempDir(), "file")
	must.NoError(t, os.WriteFile(file, nil, 0o600))
	for name, test := range map[string]struct {
		spoil func(claim *runtime.Spec, spare runtime.Sandbox)
		want  error
	}{
		"what is not there": {func(claim *runtime.Spec, _ runtime.Sandbox) { claim.SessionID = uuid.NewString() }, runtime.ErrNotFound},
		"what is no spare": {func(claim *runtime.Spec, _ runtime.Sandbox) {
			*claim = newSpec(t, d)
			_, err := d.Create(t.Context(), *claim, ignore)
			must.NoError(t, err)
		}, runtime.ErrConflict},
		"a stopped spare": {func(claim *runtime.Spec, _ runtime.Sandbox) { must.NoError(t, d.Stop(t.Context(), claim.SessionID)) }, runtime.ErrConflict},
		"a deleted spare": {func(claim *runtime.Spec, _ runtime.Sandbox) {
			must.NoError(t, d.Delete(t.Context(), claim.SessionID))
		}, runtime.ErrNotFound},
		"a dead spare": {func(_ *runtime.Spec, spare runtime.Sandbox) {
			pid, err := strconv.Atoi(spare.ContainerID)
			must.NoError(t, err)
			must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		}, runtime.ErrNotReady},
		"a spare that hangs": {func(claim *runtime.Spec, spare runtime.Sandbox) {
			pid, err := strconv.Atoi(spare.ContainerID)
			must.NoError(t, err)
			must.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
			t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) }) // so that it can end
			awaitState(t, pid, "T (stopped)")
		}, runtime.ErrNotReady},
		"another access token": {func(claim *runtime.Spec, _ runtime.Sandbox) {
			claim.AccessToken = runtime.Secret(strings.Repeat("0", 64))
		}, runtime.ErrConflict},
		"a pool":               {func(claim *runtime.Spec, _ runtime.Sandbox) { claim.Pool = "pool" }, runtime.ErrInvalid},
		"no chat":              {func(claim *runtime.Spec, _ runtime.Sandbox) { claim.ChatID = "" }, runtime.ErrInvalid},
		"a volume not there":   {func(claim *runtime.Spec, _ runtime.Sandbox) { claim.VolumeHostPath += "/missing" }, runtime.ErrInvalid},
		"a file as the volume": {func(claim *runtime.Spec, _ runtime.Sandbox) { claim.VolumeHostPath = file }, runtime.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			spare, claim := newSpare(t, d)
			test.spoil(&claim, spare)
			_, err := d.Claim(t.Context(), claim)
			must.ErrorIs(t, err, test.want)
			if seen, err := d.Inspect(t.Context(), spare.SessionID); err == nil {
				must.Eq(t, "", seen.ChatID)
				must.SliceEmpty(t, files(t, d.dir, spare.SessionID+spareExt+"/"+sessionFile))
			}
		})
	}
}

func TestClaimFollowsNoLinkOutOfAVolumeRoot(t *testing.T) {
	root := t.TempDir()
	d := openDriver(t, t.TempDir())
	d.roots = []string{root}
	must.NoError(t, os.Symlink("/", filepath.Join(root, "host")))
	must.NoError(t, os.Mkdir(filepath.Join(root, "own"), 0o700))
	_, claim := newSpare(t, d)

	claim.VolumeHostPath = filepath.Join(root, "host")
	_, err := d.Claim(t.Context(), claim)
	must.ErrorIs(t, err, runtime.ErrInvalid)
	claim.VolumeHostPath = filepath.Join(root, "own")
	_, err = d.Claim(t.Context(), claim)
	must.NoError(t, err)
}

func TestOneOfManyClaimsWins(t *testing.T) {
	d := openDriver(t, t.TempDir())
	_, claim := newSpare(t, d)
	var all sync.WaitGroup
	won := make(chan string, 10)
	for range cap(won) {
		own := claim
		own.ChatID, own.VolumeHostPath = uuid.NewString(), t.TempDir()
		all.Go(func() {
			_, err := d.Claim(t.Context(), own)
			if err == nil {
				won <- own.VolumeHostPath
				return
			}
			must.ErrorIs(t, err, runtime.ErrConflict)
		})
	}
	all.Wait()
	must.Eq(t, 1, len(won))
	must.Eq(t, <-won+"\n", run(t, d, claim.SessionID, "readlink -f $BIVOUAC_WORKSPACE"))
}

func TestADeleteDuringAClaimLeavesNothing(t *testing.T) {
	d := openDriver(t, t.TempDir())
	for range 5 {
		_, claim := newSpare(t, d)
		var claiming sync.WaitGroup
		claiming.Go(func() { _, _ = d.Claim(t.Context(), claim) }) // it may win or lose
		must.NoError(t, d.Delete(t.Context(), claim.SessionID))
		claiming.Wait()
		must.SliceEmpty(t, files(t, d.dir, "*"))
	}
}

func TestSparesHaveNoVolume(t *testing.T) {
	d := openDriver(t, t.TempDir())
	spec := newSpec(t, d)
	spec.Pool = "pool"
	_, err := d.Create(t.Context(), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrInvalid)
}

func TestEndLeftoversOfSpares(t *testing.T) {
	// Given a server that was killed with a spare and a claimed one, and a folder of a spare
	// that was not started.
	dir, volume := t.TempDir(), t.TempDir()
	notes := filepath.Join(volume, "notes.txt")
	must.NoError(t, os.WriteFile(notes, []byte("hello"), 0o600))
	spare, claimed := uuid.NewString(), uuid.NewString()
	server := exec.Command(os.Args[0])
	server.Env = append(os.Environ(), "TEST_DIR="+dir, "TEST_SPARE_ID="+spare, "TEST_CLAIM_ID="+claimed, "TEST_VOLUME="+volume)
	must.ErrorContains(t, server.Run(), "signal: killed")
	link, err := os.Readlink(filepath.Join(dir, claimed+spareExt, workspaceLink))
	must.NoError(t, err)
	must.Eq(t, volume, link)
	must.NoError(t, os.MkdirAll(filepath.Join(dir, uuid.NewString()+spareExt, emptyFolder), 0o700))

	must.NoError(t, EndLeftovers(t.Context(), dir))
	must.SliceEmpty(t, processesOf(spare))
	must.SliceEmpty(t, processesOf(claimed))
	must.SliceEmpty(t, files(t, dir, "*"))
	must.FileExists(t, notes)
}

func TestVariantTellsTheCommand(t *testing.T) {
	variant := func(command ...string) string {
		info, err := openDriver(t, t.TempDir(), command...).Info(t.Context())
		must.NoError(t, err)
		return info.Variant
	}
	must.Eq(t, variant("a", "b"), variant("a", "b"))
	must.NotEq(t, variant("a", "b"), variant("a b"))
	must.LessEq(t, 64, len(variant("a")))
}
