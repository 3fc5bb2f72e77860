package agent

import (
	"context"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

func TestARequestUnderWayIsFinished(t *testing.T) {
	// Given a server that is answering a request when it is told to stop.
	under, finish := make(chan struct{}), make(chan struct{})
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(under)
		<-finish
		_, _ = io.WriteString(w, "done")
	})}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	stopping := make(chan struct{})
	server.RegisterOnShutdown(func() { close(stopping) })
	served := make(chan error, 1)
	go func() {
		served <- serve(ctx, server, []net.Listener{listener}, noUpgrades, func(context.Context) {}, hclog.NewNullLogger())
	}()
	answered := make(chan string, 1)
	go func() {
		response, err := http.Get("http://" + listener.Addr().String())
		if err != nil {
			answered <- err.Error()
			return
		}
		body, err := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if err != nil {
			answered <- err.Error()
			return
		}
		answered <- string(body)
	}()
	<-under
	stop()
	<-stopping

	// When new requests are refused, then the one under way is still answered.
	_, err = net.Dial("tcp", listener.Addr().String())
	must.Error(t, err)
	close(finish)
	must.Eq(t, "done", <-answered)
	must.NoError(t, <-served)
}

func TestAServerThatFailsIsTold(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must.NoError(t, err)
	must.NoError(t, listener.Close())
	err = serve(t.Context(), &http.Server{}, []net.Listener{listener}, noUpgrades, func(context.Context) {}, hclog.NewNullLogger())
	must.ErrorIs(t, err, net.ErrClosed)
}

func TestRawExecRunsThisProgramUnlessToldOtherwise(t *testing.T) {
	self, err := os.Executable()
	must.NoError(t, err)
	for _, test := range []struct {
		name, template string
		told           map[string]string
		want           map[string]string
	}{
		{"told nothing", "raw_exec", nil, map[string]string{"command": self}},
		{"told something else", "raw_exec", map[string]string{"memory": "32"}, map[string]string{"command": self, "memory": "32"}},
		{"told what to run", "raw_exec", map[string]string{"command": "/bin/x"}, map[string]string{"command": "/bin/x"}},
		{"another template", "docker", map[string]string{"image": "x"}, map[string]string{"image": "x"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := jobVariables(config.Config{JobTemplate: test.template, JobVars: test.told})
			must.NoError(t, err)
			must.Eq(t, test.want, got)
		})
	}
}

func TestConfigurationCountsMoreThanTheEnvironment(t *testing.T) {
	t.Setenv("CONSUL_HTTP_ADDR", "from.environment:1")
	t.Setenv("CONSUL_HTTP_TOKEN", "from-environment")
	setting := "from environment"
	override(&setting, "")
	must.Eq(t, "from environment", setting)
	override(&setting, "from file")
	must.Eq(t, "from file", setting)

	c := config.Default()
	c.Consul.Address = "127.0.0.1:1" // nobody is there
	used, err := newConsul(c, consul.Config{}, hclog.NewNullLogger())
	must.NoError(t, err)
	err = used.store.Health(t.Context())
	must.ErrorContains(t, err, "127.0.0.1:1")
}

func TestThePasswordInConsulsAddressIsToldToNobody(t *testing.T) {
	c := config.Default()
	c.Consul.Address = "http://somebody:s3cret@127.0.0.1:1"
	_, err := newConsul(c, consul.Config{}, hclog.NewNullLogger())
	must.ErrorContains(t, err, "CONSUL_HTTP_AUTH")
	must.StrNotContains(t, err.Error(), "s3cret")
}

func TestConnectionsLeaveFilesToTheProcess(t *testing.T) {
	for files, want := range map[uint64]int{64: 32, 256: 128, 1024: 524, 4000: 3500, 1 << 20: 4096} {
		must.Eq(t, want, connectionsFor(files), must.Sprint(files))
	}
}

func TestDevFoldersAreNamedAfterTheAddress(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "/cache")
	t.Setenv("HOME", "/home/user") // where macOS looks
	first, err := devDir("127.0.0.1:4747")
	must.NoError(t, err)
	second, err := devDir("[::1]:4747")
	must.NoError(t, err)
	must.Eq(t, "127.0.0.1_4747", filepath.Base(first))
	must.Eq(t, "__1_4747", filepath.Base(second))
}

func TestQuote(t *testing.T) {
	for text, want := range map[string]string{
		"bin/bivouac": "bin/bivouac",
		"a b":         "'a b'",
		"it's":        `'it'\''s'`,
		"":            "''",
		"$HOME":       "'$HOME'",
	} {
		must.Eq(t, want, quote(text))
	}
}

func TestTheRuntimeIsOneThatTheAgentHas(t *testing.T) {
	mine := []pluginhost.Plugin{{Name: "mine", Path: "/mine"}}
	for _, test := range []struct {
		name    string
		dev     bool
		runtime string
		plugins []pluginhost.Plugin
		refused bool
	}{
		{"nomad", false, "nomad", nil, false},
		{"processes, whose records would be shared", false, "process", nil, true},
		{"processes with -dev", true, "process", nil, false},
		{"nomad with -dev, whose records would end first", true, "nomad", nil, true},
		{"a plugin", false, "mine", mine, false},
		{"a plugin with -dev", true, "mine", mine, false},
		{"a plugin without its block", false, "mine", nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := checkRuntime(config.Config{Dev: test.dev, Runtime: test.runtime, Plugins: test.plugins})
			must.Eq(t, test.refused, err != nil)
		})
	}
}

func TestWhatAnAgentCannotServeWithout(t *testing.T) {
	const mine = `plugin "mine" { path = "/mine" }`
	for _, test := range []struct {
		name     string
		flags    []string
		file     string
		nomad    string          // as the environment says
		optional map[string]bool // of each part that health asks
	}{
		{"nomad", nil, "", "", map[string]bool{"consul": false, "clock": true, "nomad": false}},
		{"nomad, with a plugin beside it", nil, mine, "", map[string]bool{"consul": false, "clock": true, "nomad": false, "plugin.mine": true}},
		{"a plugin, and nothing names nomad", []string{"-runtime=mine"}, mine, "", map[string]bool{"consul": false, "clock": true, "plugin.mine": false}},
		{"a plugin, with nomad's address in the environment", []string{"-runtime=mine"}, mine, "http://127.0.0.1:4646",
			map[string]bool{"consul": false, "clock": true, "nomad": true, "plugin.mine": false}},
		{"a plugin, with a block for nomad", []string{"-runtime=mine"}, mine + "\nnomad {}", "",
			map[string]bool{"consul": false, "clock": true, "nomad": true, "plugin.mine": false}},
		{"a plugin, with a job template", []string{"-runtime=mine", "-job-template=raw_exec"}, mine, "",
			map[string]bool{"consul": false, "clock": true, "nomad": true, "plugin.mine": false}},
		{"processes", []string{"-dev"}, "", "http://127.0.0.1:4646", map[string]bool{}},
		{"processes, with a plugin beside them", []string{"-dev"}, mine, "", map[string]bool{"plugin.mine": true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("NOMAD_ADDR", test.nomad)
			t.Setenv("HOME", t.TempDir())
			t.Setenv("XDG_CACHE_HOME", t.TempDir())
			file := filepath.Join(t.TempDir(), "a.hcl")
			must.NoError(t, os.WriteFile(file, []byte(test.file), 0o600))
			var flags config.Flags
			set := flag.NewFlagSet("agent", flag.ContinueOnError)
			flags.Register(set)
			must.NoError(t, set.Parse(append(test.flags, "-config="+file)))
			c, err := flags.Load()
			must.NoError(t, err)

			metrics, err := newMetrics(noop.Meter{})
			must.NoError(t, err)
			b, err := newBase(c, metrics, hclog.NewNullLogger())
			must.NoError(t, err)
			optional := map[string]bool{}
			for _, check := range b.checks {
				optional[check.Name] = check.Optional
			}
			must.Eq(t, test.optional, optional)
			err = Validate(t.Context(), c)
			if test.file == "" {
				must.NoError(t, err)
				return
			}
			must.EqError(t, err, file+":1: plugin.mine: stat /mine: no such file or directory")
		})
	}
}

func TestJobVarsOfAFileReachTheJobAsTheyAre(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.hcl")
	must.NoError(t, os.WriteFile(file, []byte(`
		job_vars = {
			command          = "/bin/x"
			args             = ["-v", "a b", "$${name}", "%%{ if", "\"\n\\"]
			memory           = 512
			ready_session_id = false
		}`), 0o600))
	c := config.Default()
	must.NoError(t, c.Read(file))
	template, err := jobs.Load("docker", c.JobVars)
	must.NoError(t, err)
	must.False(t, template.Ready().Check.WantSessionID)
	id := uuid.NewString()
	job, err := template.Job(runtime.Spec{SessionID: id, ChatID: id, AgentID: "a", VolumeHostPath: "/v"}, "default")
	must.NoError(t, err)
	task := job.TaskGroups[0].Tasks[0]
	must.Eq(t, 512, *task.Resources.MemoryMB)
	args, err := json.Marshal(task.Config["args"])
	must.NoError(t, err)
	must.Eq(t, `["-v","a b","${name}","%{ if","\"\n\\"]`, string(args))
}

func TestAnAgentOfDevHasAnInstanceOfItsOwn(t *testing.T) {
	must.Eq(t, "dev-127-0-0-1-4747", devInstance("127.0.0.1:4747"))
	must.Eq(t, "dev-1-4747", devInstance("[::1]:4747"))
}

// noUpgrades waits for no connections.
func noUpgrades(context.Context) error { return nil }
