package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/internal/test/stack"
)

const (
	sandboxEnv = "BIVOUAC_TEST_SANDBOX" // the root of the sandbox that this process becomes
	helperEnv  = "BIVOUAC_TEST_HELPER"  // the helperConfig of the helper that this process becomes
)

// The test binary is also a sandbox, and a helper that a test can kill.
func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv(sandboxEnv) != "":
		err = beSandbox(os.Getenv(sandboxEnv))
	case os.Getenv(helperEnv) != "":
		err = beHelper(os.Getenv(helperEnv))
	default:
		os.Exit(stack.Main(m))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// needRoot skips the test if it cannot make mount namespaces. In CI it must be able to.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("needs root, for mount namespaces")
	}
	must.Zero(t, os.Geteuid())
}

// beSandbox enters a root of its own, as a container does, and answers questions: each is a
// line of words separated by spaces, and so is the answer.
func beSandbox(root string) error {
	in := bufio.NewScanner(os.Stdin)
	in.Scan() // by now the process is in its cgroup
	steps := []func() error{
		func() error { return unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "") },
		func() error { return unix.Mount("sandbox", root, "tmpfs", 0, "") },
		func() error { return os.MkdirAll(root+"/run/bivouac", 0o755) },
		func() error { return unix.Mount("session", root+"/run/bivouac", "tmpfs", unix.MS_RDONLY, "") },
		func() error { return os.Mkdir(root+"/workspace", 0o755) },
		func() error { return os.Mkdir(root+"/old", 0o755) },
		func() error { return unix.PivotRoot(root, root+"/old") },
		func() error { return os.Chdir("/") },
		func() error { return unix.Unmount("/old", unix.MNT_DETACH) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	for in.Scan() {
		answer, err := obey(strings.Fields(in.Text()))
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Println(strings.TrimSpace(answer))
	}
	return in.Err()
}

func obey(words []string) (string, error) {
	switch words[0] {
	case "read":
		text, err := os.ReadFile(words[1])
		return string(text), err
	case "write":
		return "", os.WriteFile(words[1], []byte(words[2]), 0o644)
	case "symlink":
		return "", os.Symlink(words[1], words[2])
	case "rename":
		return "", os.Rename(words[1], words[2])
	case "mkdir":
		return "", os.Mkdir(words[1], 0o755)
	case "share":
		return "", unix.Mount("", words[1], "", unix.MS_SHARED, "")
	case "unmount":
		return "", unix.Unmount(words[1], 0)
	case "flags": // of the mount
		var fs unix.Statfs_t
		err := unix.Statfs(words[1], &fs)
		return strconv.FormatInt(fs.Flags, 10), err
	default:
		return "", fmt.Errorf("unknown question %q", words)
	}
}

// sandbox is a process with a mount namespace and a cgroup of its own, which the helper
// takes for a container of Docker or for a task of exec.
type sandbox struct {
	t     testing.TB
	order nodeapi.Order
	id    string // of the container
	group string // folder of its cgroup
	pid   int
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Scanner
}

// newSandbox starts a sandbox. The helper finds it by its order, except for the volume and
// the chat.
func (b *bench) newSandbox(driver string, env ...string) *sandbox {
	b.t.Helper()
	s := &sandbox{t: b.t, id: strings.ReplaceAll(uuid.NewString()+uuid.NewString(), "-", ""), order: nodeapi.Order{
		SessionID: uuid.NewString(), AllocID: uuid.NewString(), Task: "sandbox", TaskDriver: driver, Target: "/workspace",
	}}
	if driver == nodeapi.RawExec {
		s.order.Target = filepath.Join(nodeapi.SandboxesDir, s.order.SessionID, nodeapi.Workspace)
	}
	name := s.id
	if driver != nodeapi.Docker {
		name = s.order.AllocID + "." + s.order.Task
	}
	s.start(cgroupFor(b.t, b.config.Cgroups, name), env...)
	if driver == nodeapi.Docker {
		b.docker.add(s)
	}
	return s
}

// cgroupFor makes a cgroup below root as Nomad and Docker do.
func cgroupFor(t testing.TB, root, name string) (folder string) {
	t.Helper()
	_, err := os.Stat(filepath.Join(root, "freezer"))
	switch isNomads := strings.Contains(name, "."); {
	case err == nil:
		folder = filepath.Join(root, "freezer/nomad", name)
	case isNomads:
		folder = filepath.Join(root, "nomad.slice/share.slice", name+".scope")
	default:
		folder = filepath.Join(root, "system.slice", "docker-"+name+".scope")
	}
	must.NoError(t, os.MkdirAll(folder, 0o755))
	t.Cleanup(func() {
		if err := os.Remove(folder); !errors.Is(err, fs.ErrNotExist) {
			must.NoError(t, err)
		}
	})
	return folder
}

func (s *sandbox) start(cgroup string, env ...string) {
	s.t.Helper()
	root := s.t.TempDir()
	s.group = cgroup
	s.cmd = exec.Command(os.Args[0])
	s.cmd.Env = append(append(os.Environ(), sandboxEnv+"="+root), env...)
	s.cmd.Stderr = os.Stderr
	// Not Pdeathsig: it is sent when the thread ends that started the process, and the helper
	// ends threads.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	in, err := s.cmd.StdinPipe()
	must.NoError(s.t, err)
	out, err := s.cmd.StdoutPipe()
	must.NoError(s.t, err)
	s.in, s.out = in, bufio.NewScanner(out)
	must.NoError(s.t, s.cmd.Start())
	s.pid = s.cmd.Process.Pid
	s.t.Cleanup(s.end)
	s.moveTo(cgroup)
	must.Eq(s.t, "ready", s.ask("start"))
}

// ask returns the answer of the sandbox.
func (s *sandbox) ask(words ...string) string {
	s.t.Helper()
	_, err := fmt.Fprintln(s.in, strings.Join(words, " "))
	must.NoError(s.t, err)
	must.True(s.t, s.out.Scan(), must.Sprint("the sandbox has ended"))
	return s.out.Text()
}

// moveTo moves the sandbox to another cgroup.
func (s *sandbox) moveTo(cgroup string) {
	s.t.Helper()
	must.NoError(s.t, os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(s.pid)), 0))
}

// end kills the sandbox, waits for its end and removes its cgroup, as Nomad does.
func (s *sandbox) end() {
	_ = s.cmd.Process.Kill() // it has ended already
	_ = s.cmd.Wait()         // killed
	_ = os.Remove(s.group)   // removed
}

// fakeDocker is a Docker engine that knows the sandboxes of a test.
type fakeDocker struct {
	mu     sync.Mutex
	all    map[string]*sandbox // by the name of the container
	asked  int
	socket string
}

func newFakeDocker(t testing.TB) *fakeDocker {
	t.Helper()
	d := &fakeDocker{all: make(map[string]*sandbox), socket: filepath.Join(t.TempDir(), "docker.sock")}
	listener, err := net.Listen("unix", d.socket)
	must.NoError(t, err)
	server := httptest.NewUnstartedServer(http.HandlerFunc(d.serve))
	server.Listener = listener
	server.Start()
	t.Cleanup(server.Close)
	return d
}

func (d *fakeDocker) add(s *sandbox) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all[s.order.Task+"-"+s.order.AllocID] = s
}

func (d *fakeDocker) serve(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/containers/"), "/json")
	s := d.all[name]
	if s == nil {
		http.NotFound(w, r)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"Id":    s.id,
		"State": map[string]any{"Running": true, "Pid": s.pid},
		"Config": map[string]any{
			"Labels": map[string]string{allocIDLabel: s.order.AllocID},
			"Env":    []string{"PATH=/bin", "BIVOUAC_SESSION_ID=" + s.order.SessionID},
		},
	})
}

// helperConfig is the configuration of a helper of a test.
type helperConfig struct {
	Roots                  []string
	Docker, Records, Links string
	Cgroups                string
	Files                  credentials.Files
	KillAt                 string // the step before which the helper kills itself
}

func (c helperConfig) binder(written *records, reached func(string), log hclog.Logger) *binder {
	return &binder{
		roots: c.Roots, docker: newDockerEngine(c.Docker), cgroups: c.Cgroups, records: written,
		links: links{c.Links}, log: log, reached: reached, spares: make(map[nodeapi.Order]*process),
	}
}

// serveHelper serves as Run does, with the folders of a test. It calls listening with the
// address.
func serveHelper(ctx context.Context, c helperConfig, reached func(step string), log hclog.Logger, listening func(string)) error {
	written, err := newRecords(c.Records)
	if err != nil {
		return err
	}
	secure, err := credentials.LoadTLS(c.Files)
	if err != nil {
		return err
	}
	b := c.binder(written, reached, log)
	listener, err := listen(ctx, "127.0.0.1:0", secure)
	if err != nil {
		return err
	}
	listening(listener.Addr().String())
	return errors.Join(serveOrders(ctx, listener, b, nodeapi.ClientName, log), b.close())
}

func beHelper(text string) error {
	var c helperConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
		cancel()
	}()
	return serveHelper(ctx, c, func(step string) {
		if step == c.KillAt {
			_ = unix.Kill(unix.Getpid(), unix.SIGKILL)
			select {} // until the signal arrives
		}
	}, hclog.NewNullLogger(), func(address string) {
		fmt.Println(address)
	})
}

// bench is what a test needs: a helper, a folder with volumes, and a client.
type bench struct {
	t       testing.TB
	config  helperConfig
	docker  *fakeDocker
	root    string // of volumes
	address string // of the helper
	client  *nodeapi.Client
	ca      *certs.CA
	stop    func()
}

func newBench(t testing.TB) *bench {
	t.Helper()
	needRoot(t)
	b := &bench{t: t, docker: newFakeDocker(t), root: filepath.Join(t.TempDir(), "chats"), ca: certs.NewCA(t)}
	must.NoError(t, os.Mkdir(b.root, 0o755))
	ca, cert, key := certs.Write(t, t.TempDir(), b.ca, b.ca.Issue(t, nodeapi.ServerName))
	// Not below a folder that others may write to. The helper refuses that.
	private, err := os.MkdirTemp("/run", "bivouac-test-") //nolint:usetesting // t.TempDir is below such a folder
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, os.RemoveAll(private)) })
	b.config = helperConfig{
		Roots: []string{b.root}, Docker: b.docker.socket,
		Records: filepath.Join(private, "orders"), Links: filepath.Join(private, "sandboxes"),
		Cgroups: cgroupRoot, Files: credentials.Files{CA: ca, Certificate: cert, Key: key},
	}
	b.client = nodeapi.New(b.httpClient(b.ca, b.ca, nodeapi.ClientName))
	before := b.mounts()
	b.start()
	t.Cleanup(func() {
		b.stop()
		must.Eq(t, before, b.mounts(), must.Sprint("mounts are left on the node"))
	})
	return b
}

// mounts returns the mounts of the node that a helper could have made. Other tests make
// others.
func (b *bench) mounts() []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	must.NoError(b.t, err)
	var all []string
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, filepath.Dir(b.root)) || strings.Contains(line, " "+nodeapi.Service+" ") || strings.Contains(line, filepath.Dir(b.config.Records)) {
			all = append(all, line)
		}
	}
	return all
}

// start starts a helper in this process.
func (b *bench) start() {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	address, done := make(chan string, 1), make(chan error, 1)
	go func() {
		done <- serveHelper(ctx, b.config, nil, hclog.NewNullLogger(), func(a string) { address <- a })
	}()
	select {
	case b.address = <-address:
	case err := <-done:
		must.NoError(b.t, err)
	}
	b.stop = sync.OnceFunc(func() {
		cancel()
		must.NoError(b.t, <-done)
	})
}

// restart stops the helper and starts another one.
func (b *bench) restart() {
	b.t.Helper()
	b.stop()
	b.start()
}

// useCgroups2 has the helper, and the sandboxes from now on, use cgroups of version 2, which
// is mounted for the test if the node has version 1.
func (b *bench) useCgroups2() {
	b.t.Helper()
	b.config.Cgroups = b.t.TempDir()
	must.NoError(b.t, unix.Mount("none", b.config.Cgroups, "cgroup2", 0, ""))
	b.t.Cleanup(func() { must.NoError(b.t, unix.Unmount(b.config.Cgroups, 0)) })
	b.restart()
}

// killedHelper replaces the helper with one that kills itself before a step, and returns
// what waits for its end.
func (b *bench) killedHelper(step string) (ended func()) {
	b.t.Helper()
	b.stop()
	config := b.config
	config.KillAt = step
	text, err := json.Marshal(config)
	must.NoError(b.t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	_, err = cmd.StdinPipe() // its end is that of the helper
	must.NoError(b.t, err)
	out, err := cmd.StdoutPipe()
	must.NoError(b.t, err)
	must.NoError(b.t, cmd.Start())
	b.t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended already
	lines := bufio.NewScanner(out)
	must.True(b.t, lines.Scan())
	b.address = lines.Text()
	return func() {
		err := cmd.Wait()
		must.ErrorContains(b.t, err, "killed")
	}
}

// httpClient returns a client with a certificate of a CA for a name, which trusts another
// CA. Without a name it has no certificate.
func (b *bench) httpClient(trusted, issuer *certs.CA, name string) *http.Client {
	b.t.Helper()
	if name == "" {
		return b.clientOf(trusted, nil)
	}
	pair := issuer.Issue(b.t, name)
	return b.clientOf(trusted, &pair)
}

func (b *bench) clientOf(trusted *certs.CA, pair *certs.Pair) *http.Client {
	b.t.Helper()
	files := credentials.Files{}
	if pair == nil {
		files.CA, _, _ = certs.Write(b.t, b.t.TempDir(), trusted, certs.Pair{})
	} else {
		files.CA, files.Certificate, files.Key = certs.Write(b.t, b.t.TempDir(), trusted, *pair)
	}
	secure, err := credentials.LoadTLS(files)
	must.NoError(b.t, err)
	transport := &http.Transport{DialTLSContext: secure.Dial(nodeapi.ServerName), MaxIdleConnsPerHost: 100}
	b.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// newVolume makes a volume with a file whose content is the volume's name.
func (b *bench) newVolume() string {
	b.t.Helper()
	volume := filepath.Join(b.root, uuid.NewString())
	must.NoError(b.t, os.Mkdir(volume, 0o755))
	must.NoError(b.t, os.WriteFile(filepath.Join(volume, "name"), []byte(volume), 0o644))
	return volume
}

// bindOrder returns an order for a new chat with a new volume.
func (b *bench) bindOrder(s *sandbox) nodeapi.Order {
	order := s.order
	order.ChatID, order.AgentID, order.VolumeHostPath = uuid.NewString(), "agent", b.newVolume()
	return order
}

// binder returns another binder for the folders of the test.
func (b *bench) binder() *binder {
	written, err := newRecords(b.config.Records)
	must.NoError(b.t, err)
	all := b.config.binder(written, nil, hclog.NewNullLogger())
	b.t.Cleanup(func() { must.NoError(b.t, all.close()) })
	return all
}
