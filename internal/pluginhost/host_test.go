package pluginhost

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/runtime"
)

// quick restarts at once, and is patient with a machine that is slow.
var quick = timings{
	start:          time.Minute,
	stop:           5 * time.Second,
	healthInterval: time.Hour,
	healthLimit:    5 * time.Second,
	minPause:       10 * time.Millisecond,
	maxPause:       50 * time.Millisecond,
	steady:         time.Hour,
}

// journal is a log that a test can read while it is written.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// plays is a plugin that plays a role.
func plays(t *testing.T, name string) Plugin {
	t.Helper()
	self, err := os.Executable()
	must.NoError(t, err)
	return Plugin{
		Name: strings.Trim(strings.Map(func(r rune) rune {
			if r < 'a' || r > 'z' {
				return '-'
			}
			return r
		}, name), "-"),
		Path: self,
		Env:  map[string]string{role: name},
	}
}

// run runs a host until the test ends.
func run(t *testing.T, limits timings, plugins ...Plugin) (*Host, *journal) {
	t.Helper()
	log := &journal{}
	host, err := newHost(Config{
		Instance: "test",
		Plugins:  plugins,
		Logger:   hclog.New(&hclog.LoggerOptions{Output: log, Level: hclog.Trace}),
	}, limits)
	must.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		host.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if t.Failed() {
			t.Log(log.String())
		}
	})
	return host, log
}

// up runs a host with one plugin, and returns its driver once it is up.
func up(t *testing.T, limits timings, p Plugin) (*Driver, *Host, *journal) {
	t.Helper()
	host, log := run(t, limits, p)
	must.NoError(t, host.AwaitStart(t.Context()))
	return host.Drivers()[p.Name], host, log
}

func specOf(session, volume string) runtime.Spec {
	return runtime.Spec{SessionID: session, ChatID: "chat of " + session, AgentID: "a", VolumeHostPath: volume}
}

func create(t *testing.T, d *Driver, spec runtime.Spec) (runtime.Sandbox, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return d.Create(ctx, spec, func(runtime.Stage) {})
}

func TestPlugin_IsStartedConfiguredAndAsked(t *testing.T) {
	t.Setenv("BIVOUAC_TOKEN", "secret")
	p := plays(t, "good")
	p.Config = []byte(`{"slots":3}`)
	driver, host, _ := up(t, defaultTimings(), p)

	made, err := create(t, driver, specOf("s1", "/v"))
	must.NoError(t, err)
	found, err := driver.Inspect(t.Context(), "s1")
	must.NoError(t, err)
	must.Eq(t, made, found)
	must.NoError(t, driver.Delete(t.Context(), "s1"))
	_, err = driver.Inspect(t.Context(), "s1")
	must.ErrorIs(t, err, runtime.ErrNotFound)
	must.ErrorContains(t, err, `plugin "good"`)

	info, err := driver.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, "good", info.Name)
	status := host.Status()[0]
	must.Eq(t, StateRunning, status.State)
	must.Positive(t, status.PID)

	told := driver.Health(t.Context())
	must.ErrorContains(t, told, `instance test, configuration {"slots":3}`)
	must.ErrorContains(t, told, "PATH="+defaultPath)
	must.StrNotContains(t, told.Error(), "BIVOUAC_TOKEN")
}

func TestAbilities_AreForwarded(t *testing.T) {
	driver, _, _ := up(t, defaultTimings(), plays(t, "good"))
	_, err := create(t, driver, specOf("s1", "/v"))
	must.NoError(t, err)

	var stdout strings.Builder
	code, err := driver.Exec(t.Context(), "s1", runtime.Command{Args: []string{"cat"}},
		runtime.Streams{Stdin: strings.NewReader("hello"), Stdout: &stdout, Stderr: &stdout})
	must.NoError(t, err)
	must.Eq(t, 7, code)
	must.Eq(t, "hello", stdout.String())
	happenings, err := driver.Explain(t.Context(), "s1")
	must.NoError(t, err)
	must.Eq(t, []runtime.Happening{{Text: "made"}}, happenings)

	_, err = driver.Exec(t.Context(), "s2", runtime.Command{Args: []string{"cat"}}, runtime.Streams{})
	must.ErrorIs(t, err, runtime.ErrNotFound)
	must.ErrorContains(t, err, `plugin "good"`)
	_, err = driver.Explain(t.Context(), "s2")
	must.ErrorIs(t, err, runtime.ErrNotFound)
	for _, err := range driver.Logs(t.Context(), "s1", runtime.LogQuery{Stream: runtime.Stdout}) {
		must.ErrorIs(t, err, errors.ErrUnsupported)
	}

	_, err = driver.Exec(t.Context(), "s1", runtime.Command{Args: []string{volumeCrash}}, runtime.Streams{})
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, "engine on fire")
}

func TestClaim(t *testing.T) {
	spareOf := func(session string) runtime.Spec { return runtime.Spec{SessionID: session, Pool: "small"} }
	driver, _, _ := up(t, quick, plays(t, "good"))
	for _, session := range []string{"s1", "s2", "s3"} {
		made, err := create(t, driver, spareOf(session))
		must.NoError(t, err)
		must.Eq(t, "small", made.Pool)
	}

	t.Run("is forwarded", func(t *testing.T) {
		claimed, err := driver.Claim(t.Context(), specOf("s1", "/v"))
		must.NoError(t, err)
		must.Eq(t, "chat of s1", claimed.ChatID)
		must.Eq(t, "small", claimed.Pool)
	})
	t.Run("keeps an error, and names the plugin", func(t *testing.T) {
		_, err := driver.Claim(t.Context(), specOf("unknown", "/v"))
		must.ErrorIs(t, err, runtime.ErrNotFound)
		must.ErrorContains(t, err, `plugin "good"`)
		_, err = create(t, driver, specOf("s4", "/v"))
		must.NoError(t, err)
		_, err = driver.Claim(t.Context(), specOf("s4", "/v"))
		must.ErrorIs(t, err, runtime.ErrConflict)
	})
	t.Run("refuses the container of another session", func(t *testing.T) {
		_, err := create(t, driver, specOf("s5", volumeTwin))
		must.NoError(t, err)
		_, err = driver.Claim(t.Context(), specOf("s2", volumeTwin))
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, "which is that of session s5")
	})
	t.Run("fails if the plugin dies", func(t *testing.T) {
		_, err := driver.Claim(t.Context(), specOf("s3", volumeCrash))
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, "engine on fire")
	})
	t.Run("is not made to a plugin that does not have the ability", func(t *testing.T) {
		old, _, _ := up(t, defaultTimings(), plays(t, "old"))
		_, err := old.Claim(t.Context(), specOf("s1", "/v"))
		must.ErrorIs(t, err, errors.ErrUnsupported)
		_, err = create(t, old, spareOf("s1"))
		must.ErrorIs(t, err, errors.ErrUnsupported)
	})
}

func TestInfo_HasTheVariantOfTheProcess(t *testing.T) {
	build := filepath.Join(t.TempDir(), "variant")
	must.NoError(t, os.WriteFile(build, []byte("first "), 0o600))
	p := plays(t, "good")
	p.Config = []byte(`{"slots":3}`)
	p.Env[variantFile] = build
	driver, _, _ := up(t, quick, p)

	// It is read once the plugin is configured, and then kept.
	info, err := driver.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, `first {"slots":3}`, info.Variant)
	must.NoError(t, os.WriteFile(build, []byte("second "), 0o600))
	info, err = driver.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, `first {"slots":3}`, info.Variant)

	// A new process has its own.
	_, err = create(t, driver, specOf("s1", volumeCrash))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	comesBack(t, driver)
	info, err = driver.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, `second {"slots":3}`, info.Variant)
}

func TestPlugin_ThatCannotStartIsToldWithItsCause(t *testing.T) {
	folder := t.TempDir()
	write := func(name string, mode os.FileMode, content string) Plugin {
		path := filepath.Join(folder, name)
		must.NoError(t, os.WriteFile(path, []byte(content), mode))
		return Plugin{Name: "bad", Path: path}
	}
	with := func(p Plugin, change func(*Plugin)) Plugin {
		change(&p)
		return p
	}
	for name, tc := range map[string]struct {
		plugin Plugin
		want   string
	}{
		"missing":            {Plugin{Name: "bad", Path: filepath.Join(folder, "missing")}, "no such file"},
		"a folder":           {Plugin{Name: "bad", Path: folder}, "is not a file"},
		"not executable":     {write("plain", 0o644, "#!/bin/sh\n"), "is not executable"},
		"wrong architecture": {write("elf", 0o755, "\x7fELF\x02\x01\x01 of another world"), "is not a program for this machine"},
		"no interpreter":     {write("script", 0o755, "#!/nowhere/python\n"), "the interpreter or loader that it names is missing"},
		"wrong checksum": {with(plays(t, "good"), func(p *Plugin) { p.SHA256 = strings.Repeat("00", 32) }),
			"is not the configured sha256 0000"},
		"refused configuration":  {with(plays(t, "good"), func(p *Plugin) { p.Config = []byte(`{"slots":13}`) }), "13 slots are unlucky"},
		"unwanted configuration": {with(plays(t, "liar"), func(p *Plugin) { p.Config = []byte(`{"slots":3}`) }), "takes no configuration"},

		"exits at once":      {plays(t, "exits at once"), "exit status 3; it printed last: no engine here"},
		"closes its stdout":  {plays(t, "closes its stdout"), "Failed to read any lines"},
		"prints garbage":     {plays(t, "prints garbage"), `its first line is no handshake: "Hello, I am a plugin!\n"`},
		"prints no line end": {plays(t, "prints no line end"), `its first line is no handshake: "xxx`},
		"other core":         {plays(t, "other core"), `speaks version "2" of go-plugin's protocol`},
		"other version":      {plays(t, "other version"), `speaks version "9" of Bivouac's runtime protocol`},
		"net/rpc":            {plays(t, "net/rpc"), `speaks "netrpc", and grpc is needed`},
		"address elsewhere":  {plays(t, "address elsewhere"), `"192.0.2.1:80" is neither`},
		"no certificate":     {plays(t, "no certificate"), "no TLS certificate"},
		"bad certificate":    {plays(t, "bad certificate"), "certificate cannot be read"},
		"answers nothing":    {plays(t, "answers nothing"), "health check"},
		"implements nothing": {plays(t, "implements nothing"), "method Info not implemented"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host, log := run(t, quick, tc.plugin, Plugin{Name: "neighbour", Path: plays(t, "good").Path, Env: map[string]string{role: "good"}})
			err := host.AwaitStart(t.Context())
			must.ErrorContains(t, err, fmt.Sprintf("plugin %q", tc.plugin.Name))
			must.ErrorContains(t, err, tc.want)
			must.StrContains(t, log.String(), "plugin_failed")

			_, err = host.Drivers()[tc.plugin.Name].Inspect(t.Context(), "s")
			must.ErrorIs(t, err, runtime.ErrUnavailable)
			must.ErrorContains(t, err, tc.want)

			_, err = create(t, host.Drivers()["neighbour"], specOf("s", "/v"))
			must.NoError(t, err, must.Sprint("the other plugin works on"))
		})
	}
}

func TestPlugin_WhoseSocketHasNoRoomIsToldSo(t *testing.T) {
	long := filepath.Join(t.TempDir(), strings.Repeat("long/", 20))
	must.NoError(t, os.MkdirAll(long, 0o700))
	t.Setenv("TMPDIR", long)
	host, _ := run(t, quick, plays(t, "good"))
	err := host.AwaitStart(t.Context())
	must.ErrorContains(t, err, "the path of its socket, a file in "+long+"/plugin-dir")
	must.ErrorContains(t, err, fmt.Sprintf("may have %d bytes at most: set TMPDIR to a folder with a shorter path", maxSocketPath))
}

func TestCheck_FindsWhatIsWrongWithAPlugin(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Plugin)
		want   string // empty: nothing is wrong
	}{
		{"nothing", func(*Plugin) {}, ""},
		{"no file", func(p *Plugin) { p.Path = "/nowhere/plugin" }, "stat /nowhere/plugin: no such file or directory"},
		{"another file", func(p *Plugin) { p.SHA256 = strings.Repeat("00", 32) }, "is not the configured sha256 0000"},
		{"a configuration that the plugin refuses", func(p *Plugin) { p.Config = []byte(`{"slots":13}`) }, "13 slots are unlucky"},
		{"no plugin", func(p *Plugin) { p.Env[role] = "exits at once" }, "exit status 3; it printed last: no engine here"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := plays(t, "good")
			test.change(&p)
			_, err := Check(t.Context(), Config{Logger: hclog.NewNullLogger()}, p)
			if test.want == "" {
				must.NoError(t, err)
				return
			}
			must.ErrorContains(t, err, test.want)
		})
	}
}

func TestPlugin_ThatSaysNothingIsGivenUp(t *testing.T) {
	limits := quick
	limits.start = 200 * time.Millisecond
	host, _ := run(t, limits, plays(t, "says nothing"))
	must.ErrorContains(t, host.AwaitStart(t.Context()), `plugin "says-nothing": it printed no handshake within 200ms`)
}

func TestStop_StartsNoPluginThatWaits(t *testing.T) {
	// Given a plugin that failed and is started again in an hour.
	limits := quick
	limits.minPause = time.Hour
	started := filepath.Join(t.TempDir(), "started")
	script := filepath.Join(t.TempDir(), "plugin")
	must.NoError(t, os.WriteFile(script, []byte("#!/bin/sh\necho >>"+started+"\n"), 0o755))
	host, err := newHost(Config{Plugins: []Plugin{{Name: "bad", Path: script}}, Logger: hclog.NewNullLogger()}, limits)
	must.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		host.Run(ctx)
	}()
	must.Error(t, host.AwaitStart(t.Context()))

	// When the host ends, then it is not started once more before that.
	cancel()
	<-done
	text, err := os.ReadFile(started)
	must.NoError(t, err)
	must.Eq(t, "\n", string(text))
	must.Eq(t, StateStopped, host.Status()[0].State)
	must.Eq(t, 0, host.Status()[0].Restarts)
}

func TestProcess_ThatIsGivenUpBeforeItsStartDoesNotStart(t *testing.T) {
	p := newProcess(Plugin{}, "/bin/true", newLauncher(), newOutput(hclog.NewNullLogger()))
	p.kill()
	must.ErrorIs(t, p.Start(t.Context()), errKilled)
	must.Eq(t, 0, p.pid())
}

func TestPlugin_WithTheRightChecksumIsStartedEachTime(t *testing.T) {
	p := plays(t, "good")
	content, err := os.ReadFile(p.Path)
	must.NoError(t, err)
	sum := sha256.Sum256(content)
	p.SHA256 = hex.EncodeToString(sum[:])
	driver, _, _ := up(t, quick, p)
	_, err = create(t, driver, specOf("s1", volumeCrash))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	comesBack(t, driver)
}

// comesBack waits until the plugin's next life.
func comesBack(t *testing.T, d *Driver) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		_, err := d.plugin.await(ctx)
		must.NoError(t, err)
		_, err = d.Inspect(ctx, "nobody")
		if errors.Is(err, runtime.ErrNotFound) {
			return
		}
		must.ErrorIs(t, err, runtime.ErrUnavailable)
	}
}

func TestCrash_FailsCallsAtOnceAndIsMendedByARestart(t *testing.T) {
	p := plays(t, "good")
	p.Config = []byte(`{"slots":5}`)
	slow := quick
	slow.minPause = time.Hour // it does not come back while the test looks
	driver, host, _ := up(t, slow, p)
	waiting := make(chan error, 1)
	go func() {
		_, err := create(t, driver, specOf("bystander", volumeWait))
		waiting <- err
	}()
	_, err := create(t, driver, specOf("s1", volumeCrash))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, "exit status 2; it printed last: panic: engine on fire")
	must.ErrorIs(t, <-waiting, runtime.ErrUnavailable)

	awaitState(t, host, StateWaiting)
	began := time.Now()
	_, err = driver.Inspect(t.Context(), "s1")
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, `plugin "good": runtime unavailable: it is waiting: its process ended: exit status 2`)
	must.Less(t, time.Second, time.Since(began))
	must.Error(t, driver.Health(t.Context()))
}

func TestCrash_IsFollowedByANewConfiguredLife(t *testing.T) {
	p := plays(t, "good")
	p.Config = []byte(`{"slots":5}`)
	driver, host, _ := up(t, quick, p)
	for n := range 3 {
		_, err := create(t, driver, specOf("s1", volumeCrash))
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		comesBack(t, driver)
		must.ErrorContains(t, driver.Health(t.Context()), `configuration {"slots":5}`)
		must.Eq(t, n+1, host.Status()[0].Restarts)
	}
}

func TestCrash_IsWaitedOutWhereThePluginWasUpOnce(t *testing.T) {
	// Given a plugin that crashed, beside one that never was up.
	limits := quick
	limits.minPause = 200 * time.Millisecond
	host, _ := run(t, limits, plays(t, "good"), Plugin{Name: "never", Path: "/no/such/file"})
	must.ErrorContains(t, host.AwaitStart(t.Context()), `plugin "never"`)
	driver := host.Drivers()["good"]
	_, err := create(t, driver, specOf("s1", volumeCrash))
	must.ErrorIs(t, err, runtime.ErrUnavailable)

	// When the host is asked to wait, then the first one answers, and the second
	// one is not waited for.
	for _, d := range host.Drivers() {
		must.NoError(t, d.AwaitReturn(t.Context()))
	}
	_, err = driver.Inspect(t.Context(), "s1")
	must.ErrorIs(t, err, runtime.ErrNotFound)
	must.Eq(t, 1, host.Status()[0].Restarts)
}

// awaitState waits until the host's only plugin is in a state.
func awaitState(t *testing.T, host *Host, want State) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := host.plugins[0]
	must.NoError(t, p.changed.Wait(ctx, func() bool { return p.status.State == want }))
}

func TestHang_IsFoundByTheHealthCheck(t *testing.T) {
	limits := quick
	limits.healthInterval, limits.healthLimit = 20*time.Millisecond, time.Second
	driver, host, log := up(t, limits, plays(t, "good"))
	first := host.Status()[0].PID
	_, err := create(t, driver, specOf("s1", volumeHang))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	comesBack(t, driver)
	must.NotEq(t, first, host.Status()[0].PID)
	must.StrContains(t, log.String(), "health check")
}

func TestAnswers_ThatCannotBeAreErrorsThatNameThePlugin(t *testing.T) {
	driver, host, _ := up(t, defaultTimings(), plays(t, "liar"))
	for session, want := range map[string]string{"huge": "larger than max", "nowhere": `"localhost" is no address`} {
		_, err := driver.Inspect(t.Context(), session)
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, `plugin "liar"`)
		must.ErrorContains(t, err, want)
	}
	var last error
	for _, last = range driver.List(t.Context()) {
	}
	must.ErrorIs(t, last, runtime.ErrUnavailable)
	must.ErrorContains(t, last, "more than 1500000 sandboxes")
	must.Eq(t, 0, host.Status()[0].Restarts)
}

func TestContainer_OfAnotherSessionIsRefused(t *testing.T) {
	driver, _, _ := up(t, defaultTimings(), plays(t, "good"))
	_, err := create(t, driver, specOf("s1", volumeTwin))
	must.NoError(t, err)
	_, err = create(t, driver, specOf("s2", volumeTwin))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, `with container "twin", which is that of session s1`)
	must.NoError(t, driver.Delete(t.Context(), "s2"))
	must.NoError(t, driver.Delete(t.Context(), "s1"))
	_, err = create(t, driver, specOf("s3", volumeTwin))
	must.NoError(t, err, must.Sprint("a container's name may come again"))
}

func TestContainer_OfASessionOfAnEarlierHostIsRefused(t *testing.T) {
	// Given a plugin with a sandbox that this host has never seen.
	driver, _, _ := up(t, defaultTimings(), plays(t, "twins"))

	// When it makes another with the same container, then that is refused, by
	// whatever call it is shown.
	_, err := create(t, driver, specOf("new", volumeTwin))
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, `with container "twin", which is that of session old`)
	_, err = driver.Inspect(t.Context(), "new")
	must.ErrorIs(t, err, runtime.ErrUnavailable)
	must.ErrorContains(t, err, "that of session old")
	_, err = driver.Inspect(t.Context(), "old")
	must.NoError(t, err)
}

func TestList_TellsWhoseAContainerIs(t *testing.T) {
	driver, _, _ := up(t, defaultTimings(), plays(t, "twins"))
	inc, err := driver.plugin.now()
	must.NoError(t, err)
	<-inc.learned
	driver.plugin.owners.release("old")
	for _, err := range driver.List(t.Context()) {
		must.NoError(t, err)
	}
	other, taken := driver.plugin.owners.claim(runtime.Sandbox{SessionID: "new", ContainerID: "twin"})
	must.True(t, taken)
	must.Eq(t, "old", other)
}

func TestErrors_ThatThePluginAnsweredAreNotWaitedOver(t *testing.T) {
	driver, _, _ := up(t, defaultTimings(), plays(t, "good"))
	began := time.Now()
	const times = 20
	for range times {
		must.ErrorIs(t, driver.Health(t.Context()), runtime.ErrUnavailable)
	}
	must.Less(t, times*brokenLimit/2, time.Since(began))
}

func TestOutput_CannotHurtTheHost(t *testing.T) {
	for _, name := range []string{"floods stderr", "prints what is no log line"} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			driver, _, log := up(t, defaultTimings(), plays(t, name))
			_, err := create(t, driver, specOf("s1", "/v"))
			must.NoError(t, err)
			// What is let through is so much a second, however long it lasts.
			seconds := int(time.Since(began)/time.Second) + 1
			must.Less(t, seconds*16<<20, len(log.String()))
			must.StrNotContains(t, log.String(), "\x1b")
		})
	}
}

func TestStop_EndsTheGroupAndSparesDetachedSandboxes(t *testing.T) {
	host, err := newHost(Config{Instance: "test", Plugins: []Plugin{plays(t, "good")}, Logger: hclog.NewNullLogger()}, defaultTimings())
	must.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		host.Run(ctx)
	}()
	must.NoError(t, host.AwaitStart(t.Context()))
	driver := host.Drivers()["good"]
	pids := map[string]int{"plugin": host.Status()[0].PID}
	for _, volume := range []string{volumeHelper, volumeDetach} {
		sandbox, err := create(t, driver, specOf(volume, volume))
		must.NoError(t, err)
		pids[volume], err = strconv.Atoi(sandbox.ContainerID)
		must.NoError(t, err)
	}
	ends := map[string]func(time.Duration) bool{}
	for name, pid := range pids {
		ends[name] = watchPID(t, pid)
	}
	cancel()
	<-done
	must.True(t, ends["plugin"](10*time.Second))
	must.True(t, ends[volumeHelper](10*time.Second))
	must.False(t, ends[volumeDetach](0))
	must.NoError(t, unix.Kill(pids[volumeDetach], unix.SIGKILL))

	must.Eq(t, StateStopped, host.Status()[0].State)
	_, err = driver.Inspect(t.Context(), "s")
	must.ErrorIs(t, err, runtime.ErrUnavailable)
}

func TestHost_TakesItsPluginsWithItWhenItIsKilled(t *testing.T) {
	self, err := os.Executable()
	must.NoError(t, err)
	host := exec.Command(self)
	// What a killed host leaves in its temporary folder is taken away here.
	folder, err := os.MkdirTemp("", "host") //nolint:usetesting // t.TempDir is too long for a unix socket's name
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, os.RemoveAll(folder)) })
	host.Env = append(os.Environ(), role+"=host", "TMPDIR="+folder)
	stdout, err := host.StdoutPipe()
	must.NoError(t, err)
	must.NoError(t, host.Start())
	line, err := bufio.NewReader(stdout).ReadString('\n')
	must.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	must.NoError(t, err)
	ended := watchPID(t, pid)
	must.NoError(t, host.Process.Kill())
	must.Error(t, host.Wait())
	must.True(t, ended(10*time.Second))
}

// watchPID returns a function that says whether the process ends within a time.
func watchPID(t *testing.T, pid int) func(time.Duration) bool {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, unix.Close(fd)) })
	return func(limit time.Duration) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(limit.Milliseconds()))
		must.NoError(t, err)
		return n == 1
	}
}

func TestNew_RefusesWhatCannotBeRight(t *testing.T) {
	for name, tc := range map[string]struct {
		plugin Plugin
		want   string
	}{
		"no name":             {Plugin{}, "its name is not"},
		"a path as its name":  {Plugin{Name: "../sh"}, "its name is not"},
		"no folder":           {Plugin{Name: "x"}, "there is no plugin_dir"},
		"half a checksum":     {Plugin{Name: "x", Path: "/x", SHA256: "abcd"}, "is not 64 hex digits"},
		"config no object":    {Plugin{Name: "x", Path: "/x", Config: []byte(`[1]`)}, "is not a JSON object"},
		"variable with equal": {Plugin{Name: "x", Path: "/x", Env: map[string]string{"A=B": "c"}}, "variable of its environment"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(Config{Instance: "test", Plugins: []Plugin{tc.plugin}, Logger: hclog.NewNullLogger()})
			must.ErrorContains(t, err, fmt.Sprintf("plugin %q", tc.plugin.Name))
			must.ErrorContains(t, err, tc.want)
		})
	}
	_, err := New(Config{Dir: "/x", Plugins: []Plugin{{Name: "x"}, {Name: "x"}}, Logger: hclog.NewNullLogger()})
	must.ErrorContains(t, err, "configured twice")
}
