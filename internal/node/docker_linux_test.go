package node

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

// docker runs a docker command and returns what it prints.
func docker(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "docker", args...).CombinedOutput()
	must.NoError(t, err, must.Sprintf("docker %s: %s", strings.Join(args, " "), out))
	return strings.TrimSpace(string(out))
}

// newDockerBench is like newBench, with a real Docker engine. Without one it skips the
// test, unless it runs in CI.
func newDockerBench(t testing.TB) (b *bench, image string) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs Docker")
	}
	needRoot(t)
	if out, err := exec.CommandContext(t.Context(), "docker", "version").CombinedOutput(); err != nil && os.Getenv("CI") == "" {
		t.Skipf("needs Docker: %s", out)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil && os.Getenv("CI") == "" {
		t.Skip("needs busybox-static: ", err)
	}
	must.NoError(t, err)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, dir := range []string{"bin/", "workspace/", "tmp/"} {
		must.NoError(t, w.WriteHeader(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}))
	}
	must.NoError(t, w.WriteHeader(&tar.Header{Name: "bin/busybox", Mode: 0o755, Size: int64(len(busybox))}))
	_, err = w.Write(busybox)
	must.NoError(t, errors.Join(err, w.Close()))
	image = "bivouac-node-test:" + uuid.NewString()
	cmd := exec.CommandContext(t.Context(), "docker", "import", "-", image)
	cmd.Stdin = &layer
	out, err := cmd.CombinedOutput()
	must.NoError(t, err, must.Sprintf("%s", out))
	t.Cleanup(func() {
		_ = exec.Command("docker", "image", "rm", "-f", image).Run()
	})

	b = newBench(t)
	b.config.Docker = dockerSocket
	b.restart()
	return b, image
}

// container is a container that is restricted as those of the docker template are.
type container struct {
	t     testing.TB
	order nodeapi.Order
	name  string
}

func (b *bench) newContainer(image string, options ...string) *container {
	b.t.Helper()
	c := &container{t: b.t, order: nodeapi.Order{
		SessionID: uuid.NewString(), AllocID: uuid.NewString(), Task: "sandbox", TaskDriver: nodeapi.Docker, Target: "/workspace",
	}}
	c.name = c.order.Task + "-" + c.order.AllocID
	args := slices.Concat([]string{
		"run", "--detach", "--name", c.name,
		"--label", allocIDLabel + "=" + c.order.AllocID,
		"--env", "BIVOUAC_SESSION_ID=" + c.order.SessionID,
		"--cap-drop", "ALL", "--read-only", "--security-opt", "no-new-privileges", "--pids-limit", "64", "--network", "none",
		"--mount", "type=tmpfs,target=/workspace", "--tmpfs", "/run/bivouac:ro,size=4096", "--tmpfs", "/tmp",
	}, options, []string{image, "/bin/busybox", "sleep", "1000000"})
	docker(b.t, args...)
	b.t.Cleanup(c.remove)
	return c
}

func (c *container) remove() {
	_ = exec.Command("docker", "rm", "-f", c.name).Run()
}

// try runs a busybox command in the container and returns what it prints.
func (c *container) try(args ...string) (string, error) {
	out, err := exec.CommandContext(c.t.Context(), "docker", slices.Concat([]string{"exec", c.name, "/bin/busybox"}, args)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (c *container) mustRun(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	must.NoError(c.t, err, must.Sprint(out))
	return out
}

func TestBind_inDocker(t *testing.T) {
	b, image := newDockerBench(t)
	c := b.newContainer(image)
	// A program that lies, in a container of its own.
	liar := b.newContainer(image, "--env", "NOMAD_ALLOC_ID="+c.order.AllocID)
	must.NoError(t, b.client.Look(t.Context(), b.address, c.order))

	order := c.order
	order.ChatID, order.AgentID, order.VolumeHostPath = uuid.NewString(), "agent", b.newVolume()
	must.NoError(t, os.Chmod(order.VolumeHostPath, 0o777))
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))
	b.restart()
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))

	must.Eq(t, order.VolumeHostPath, c.mustRun("cat", "/workspace/name"))
	must.Eq(t, fmt.Sprintf(`{"session_id":%q,"chat_id":%q,"agent_id":"agent"}`, order.SessionID, order.ChatID), c.mustRun("cat", sessionPath))
	must.Eq(t, "444 0", c.mustRun("stat", "-c", "%a %u", sessionPath))
	c.mustRun("touch", "/workspace/new")
	must.FileExists(t, filepath.Join(order.VolumeHostPath, "new"))
	must.Eq(t, "", liar.mustRun("ls", "/workspace"))

	// The processes of another user, and a root file system that can be written to.
	plain := b.newContainer(image, "--user", "65534:65534", "--read-only=false")
	theirs := plain.order
	theirs.ChatID, theirs.AgentID, theirs.VolumeHostPath = uuid.NewString(), "agent", b.newVolume()
	must.NoError(t, b.client.Bind(t.Context(), b.address, theirs))
	must.Eq(t, theirs.VolumeHostPath, plain.mustRun("cat", "/workspace/name"))

	for _, attack := range [][]string{
		{"umount", "/workspace"},
		{"umount", nodeapi.SessionDir},
		{"rm", sessionPath},
		{"touch", nodeapi.SessionDir + "/x"},
		{"mount", "-o", "remount,rw", nodeapi.SessionDir},
		{"mount", "-t", "tmpfs", "x", "/workspace"},
		{"mknod", "/workspace/null", "c", "1", "3"},
		{"unshare", "-m", "true"},
	} {
		out, err := c.try(attack...)
		t.Log(attack, ": ", out)
		must.Error(t, err)
	}

	other := order
	other.ChatID, other.VolumeHostPath = uuid.NewString(), b.newVolume()
	must.ErrorIs(t, b.client.Bind(t.Context(), b.address, other), runtime.ErrConflict)

	c.remove()
	err := b.client.Bind(t.Context(), b.address, order)
	t.Log(err)
	must.ErrorIs(t, err, runtime.ErrNotFound)
	must.FileExists(t, filepath.Join(order.VolumeHostPath, "new"))
	sweeper := b.binder()
	sweeper.sweep(t.Context())
	left, err := sweeper.records.allocations()
	must.NoError(t, err)
	must.Eq(t, []string{plain.order.AllocID}, left)
}

// BenchmarkBind_inDocker measures one bind of a container that was looked for, through
// HTTPS.
func BenchmarkBind_inDocker(b *testing.B) {
	bench, image := newDockerBench(b)
	c := bench.newContainer(image)
	pid, err := strconv.Atoi(docker(b, "inspect", "-f", "{{.State.Pid}}", c.name))
	must.NoError(b, err)
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	must.NoError(b, err)
	defer ns.Close() //nolint:errcheck // it was only entered
	order := c.order
	order.ChatID, order.AgentID, order.VolumeHostPath = uuid.NewString(), "agent", bench.newVolume()
	bench.measureBinds(b, order, func() {
		must.NoError(b, inNamespace(ns, func() error {
			return errors.Join(unix.Unmount("/workspace", 0), unix.Unmount(nodeapi.SessionDir, 0))
		}))
	})
}
