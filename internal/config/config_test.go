package config

import (
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/scheduler"
)

// load is what an agent does with its command line. FILE in an argument stands
// for a file of that name in dir.
func load(t *testing.T, args ...string) (Config, error) {
	t.Helper()
	set := flag.NewFlagSet("agent", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	var flags Flags
	flags.Register(set)
	if err := set.Parse(args); err != nil {
		return Config{}, err
	}
	return flags.Load()
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	must.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

const full = `
http_addr        = "[::1]:4800"
runtime          = "process"
ttl              = "1h"
max_ttl          = "2h"
cleanup_interval = "5s"
volume_roots     = ["/srv/a", "/srv/b"]
job_template     = "exec"
job_vars         = { image = "busybox", port = 80 }
kv_prefix        = "tenants/a/"
instance         = "a"
log_level        = "debug"
log_json         = true

events {
  retention = "2h"
  max       = 20000
}

consul {
  address         = "https://127.0.0.1:8501"
  token           = "c-secret"
  ca_file         = "/etc/consul/ca.pem"
  cert_file       = "/etc/consul/client.pem"
  key_file        = "/etc/consul/client-key.pem"
  tls_server_name = "server.dc1.consul"
  datacenter      = "dc1"
  namespace       = "chat"
  partition       = "east"
}

nomad {
  address         = "https://user:n-secret@127.0.0.1:4646"
  token           = "n-secret"
  ca_file         = "/etc/nomad-ca.pem"
  cert_file       = "/etc/nomad-cert.pem"
  key_file        = "/etc/nomad-key.pem"
  tls_server_name = "server.global.nomad"
  region          = "global"
  namespace       = "bivouac"
}
`

func TestFile(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", full))
	must.NoError(t, err)
	c.origins = nil
	must.Eq(t, Config{
		HTTPAddrs:       []string{"[::1]:4800"},
		UnixSockets:     UnixSockets{Mode: "0600"},
		TLS:             TLS{MinVersion: "tls12"},
		Runtime:         "process",
		TTL:             time.Hour,
		MaxTTL:          2 * time.Hour,
		CleanupInterval: 5 * time.Second,
		VolumeRoots:     []string{"/srv/a", "/srv/b"},
		JobTemplate:     "exec",
		JobVars:         map[string]string{"image": "busybox", "port": "80"},
		KVPrefix:        "tenants/a/",
		Instance:        "a",
		LogLevel:        "debug",
		LogJSON:         true,
		Events:          scheduler.Retention{Age: 2 * time.Hour, Max: 20_000},
		Consul: Consul{
			Address: "https://127.0.0.1:8501", Token: "c-secret",
			CAFile: "/etc/consul/ca.pem", CertFile: "/etc/consul/client.pem", KeyFile: "/etc/consul/client-key.pem", TLSServerName: "server.dc1.consul",
			Datacenter: "dc1", Namespace: "chat", Partition: "east",
		},
		Nomad: Nomad{
			Address: "https://user:n-secret@127.0.0.1:4646", Token: "n-secret",
			CAFile: "/etc/nomad-ca.pem", CertFile: "/etc/nomad-cert.pem", KeyFile: "/etc/nomad-key.pem",
			TLSServerName: "server.global.nomad", Region: "global", Namespace: "bivouac",
		},
	}, c)
}

func TestJSONSaysTheSame(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.json", `{"ttl": "1h", "job_vars": {"image": "x"}, "volume_roots": ["/srv"], "consul": {"token": "t"}}`))
	must.NoError(t, err)
	must.Eq(t, time.Hour, c.TTL)
	must.Eq(t, map[string]string{"image": "x"}, c.JobVars)
	must.Eq(t, []string{"/srv"}, c.VolumeRoots)
	must.Eq(t, "t", c.Consul.Token)
}

func TestPlugins(t *testing.T) {
	for name, text := range map[string]string{
		"a.hcl": `
plugin_dir = "/opt/plugins"
plugin "docker" {
  args   = ["-v"]
  env    = { DOCKER_HOST = "unix:///run/docker.sock" }
  sha256 = "` + strings.Repeat("ab", 32) + `"
  config {
    image  = "busybox"
    limits = { memory = 64, ports = [80, 443] }
    quiet  = true
  }
}
plugin "mine" {
  path = "/home/me/mine"
}
`,
		"a.json": `{"plugin_dir": "/opt/plugins", "plugin": {
  "docker": {"args": ["-v"], "env": {"DOCKER_HOST": "unix:///run/docker.sock"}, "sha256": "` + strings.Repeat("ab", 32) + `",
             "config": {"image": "busybox", "limits": {"memory": 64, "ports": [80, 443]}, "quiet": true}},
  "mine": {"path": "/home/me/mine"}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			c, err := load(t, "-config", write(t, name, text), "-runtime=docker")
			must.NoError(t, err)
			must.Eq(t, "/opt/plugins", c.PluginDir)
			must.Eq(t, []pluginhost.Plugin{{
				Name:   "docker",
				Args:   []string{"-v"},
				Env:    map[string]string{"DOCKER_HOST": "unix:///run/docker.sock"},
				Config: []byte(`{"image":"busybox","limits":{"memory":64,"ports":[80,443]},"quiet":true}`),
				SHA256: strings.Repeat("ab", 32),
			}, {
				Name: "mine",
				Path: "/home/me/mine",
			}}, c.Plugins)
			must.Eq[any](t, map[string]any{
				"docker": map[string]any{"path": "", "sha256": strings.Repeat("ab", 32), "env": []string{"DOCKER_HOST"}},
				"mine":   map[string]any{"path": "/home/me/mine", "sha256": "", "env": []string{}},
			}, c.Public()["plugin"])
		})
	}
}

func TestAPluginStandsInOneFile(t *testing.T) {
	first := write(t, "a.hcl", "plugin \"x\" { path = \"/x\" }")
	second := write(t, "b.hcl", "\nplugin \"x\" { path = \"/y\" }")
	_, err := load(t, "-config", first, "-config", second)
	must.ErrorContains(t, err, second+`:2: Duplicate plugin block: plugin "x" is already defined at `+first+":1.")
}

func TestNothingSaid(t *testing.T) {
	c, err := load(t)
	must.NoError(t, err)
	must.Eq(t, Default(), c)

	dev, err := load(t, "-dev")
	must.NoError(t, err)
	must.True(t, dev.Dev)
	must.Eq(t, "process", dev.Runtime)
}

func TestDevMayStandInAFile(t *testing.T) {
	file := write(t, "a.hcl", "dev = true")
	dev, err := load(t, "-config", file)
	must.NoError(t, err)
	must.True(t, dev.Dev)
	must.Eq(t, "process", dev.Runtime)

	other, err := load(t, "-config", file, "-dev=false")
	must.NoError(t, err)
	must.Eq(t, "nomad", other.Runtime)

	own, err := load(t, "-config", write(t, "b.hcl", "dev = true\nruntime = \"mine\""))
	must.NoError(t, err)
	must.Eq(t, "mine", own.Runtime)
}

func TestDevHasNoJobs(t *testing.T) {
	_, err := load(t, "-dev", "-job-var=command=/bin/x", `-job-var=args=["a"]`)
	must.NoError(t, err)
	_, err = load(t, "-dev", "-job-template=raw_exec")
	must.ErrorContains(t, err, "-job-template: job_template: there are no jobs with dev")
	_, err = load(t, "-dev", "-config", write(t, "a.hcl", `job_vars = { memory = "1", image = "x" }`))
	must.ErrorContains(t, err, `a.hcl:1: job_vars: unknown variable "image": with dev`)
	must.ErrorContains(t, err, `unknown variable "memory"`)
}

func TestWhatIsSaid(t *testing.T) {
	for _, test := range []struct {
		name string
		args []string
		want bool
	}{
		{"by nobody", nil, false},
		{"of something else", []string{"-ttl=1m", "-config", write(t, "a.hcl", "consul {}")}, false},
		{"by a flag", []string{"-job-template=exec"}, true},
		{"in a file", []string{"-config", write(t, "a.json", `{"job_template": "exec"}`)}, true},
		{"by an empty block", []string{"-config", write(t, "a.hcl", "nomad {}")}, true},
		{"by a block in JSON", []string{"-config", write(t, "a.json", `{"nomad": {"region": "global"}}`)}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := load(t, test.args...)
			must.NoError(t, err)
			must.Eq(t, test.want, c.Says("nomad", "job_template"))
		})
	}
}

func TestLaterCountsMore(t *testing.T) {
	folder := t.TempDir()
	for name, text := range map[string]string{
		"10.hcl":    `ttl = "10m"` + "\n" + `job_vars = { a = "10", b = "10" }` + "\n" + `volume_roots = ["/10"]`,
		"20.json":   `{"ttl": "20m", "job_vars": {"b": "20"}}`,
		"30.ignore": `not read`,
	} {
		must.NoError(t, os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600))
	}
	single := write(t, "single.hcl", `max_ttl = "3h"`+"\n"+`consul { token = "t" }`)

	t.Run("of files", func(t *testing.T) {
		c, err := load(t, "-config", folder, "-config", single)
		must.NoError(t, err)
		must.Eq(t, 20*time.Minute, c.TTL)
		must.Eq(t, 3*time.Hour, c.MaxTTL)
		must.Eq(t, map[string]string{"a": "10", "b": "20"}, c.JobVars)
		must.Eq(t, []string{"/10"}, c.VolumeRoots)
		must.Eq(t, "t", c.Consul.Token)
	})
	t.Run("flags over files, wherever they stand", func(t *testing.T) {
		c, err := load(t, "-ttl", "40m", "-volume-root=/x", "-volume-root=/y", "-job-var", "b=c=d", "-log-json", "-config", folder)
		must.NoError(t, err)
		must.Eq(t, 40*time.Minute, c.TTL)
		must.Eq(t, map[string]string{"a": "10", "b": "c=d"}, c.JobVars)
		must.Eq(t, []string{"/x", "/y"}, c.VolumeRoots)
		must.True(t, c.LogJSON)
	})
}

func TestWrongFilesAreRefusedWithTheirLine(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"a.hcl", "ttl = \"1h\"\ntlt = \"1h\"", `a.hcl:2: Unsupported argument`},
		{"a.hcl", "\n\nttl = \"soon\"", `a.hcl:3: Wrong value: ttl: "soon" is not a duration`},
		{"a.hcl", "ttl = 30", `a.hcl:1: Wrong value: ttl: "30" is not a duration`},
		{"a.hcl", "ttl = null", `a.hcl:1: Wrong value: ttl: must not be null`},
		{"a.hcl", "ttl = [\"1h\"]", `a.hcl:1: `},
		{"a.hcl", "log_json = \"perhaps\"", `a.hcl:1: `},
		{"a.hcl", "volume_roots = \"/srv\"", `a.hcl:1: `},
		{"a.hcl", "volume_roots = [\"/srv/../etc\"]", `a.hcl:1: volume_roots: "/srv/../etc" is not an absolute, clean path`},
		{"a.hcl", "job_vars = [1]", `a.hcl:1: `},
		{"a.hcl", "\njob_vars = { a = null }", `a.hcl:2: Wrong value: job_vars: a: must not be null`},
		{"a.hcl", "plugin \"x\" {\n  path = \"/x\"\n  env = { a = [1] }\n}", `a.hcl:3: `},
		{"a.hcl", "\nnomad {\n  address = \"ftp://x\"\n}", `a.hcl:3: nomad.address: "ftp://x" is not an address such as http://127.0.0.1:4646`},
		{"a.hcl", "nomad { address = \"localhost:4646\" }", `a.hcl:1: nomad.address: "localhost:4646"`},
		{"a.hcl", "nomad { address = \"http://\" }", `a.hcl:1: nomad.address: "http://"`},
		{"a.hcl", "nomad {\n  token = \"a\"\n  token_file = \"/a\"\n}", `a.hcl:3: nomad.token_file: set either token or token_file`},
		{"a.hcl", "nomad {\n  cert_file = \"/a\"\n}", `a.hcl:1: nomad: set cert_file and key_file together`},
		{"a.hcl", "nomad {\n  helper_ca_file = \"/a\"\n  helper_key_file = \"/b\"\n}", `a.hcl:1: nomad: set helper_ca_file, helper_cert_file and helper_key_file together`},
		{"a.hcl", "nomad {\n  helper_namespace = \"a\"\n}", `a.hcl:2: nomad.helper_namespace: it has no use without helper_ca_file`},
		{"a.hcl", "nomad { address = \"unix://x\" }", `a.hcl:1: nomad.address: "unix://x"`},
		{"a.hcl", "volume_roots = [\"/srv\", \"/srv/a\"]", `a.hcl:1: volume_roots: "/srv/a" is inside the volume root "/srv"`},
		{"a.hcl", "volume_roots = [\"/\", \"/srv\"]", `a.hcl:1: volume_roots: "/srv" is inside the volume root "/"`},
		{"a.hcl", "\nhttp_addr = \"0.0.0.0:4747\"", `a.hcl:2: http_addr: "0.0.0.0" is not a loopback address`},
		{"a.hcl", "max_ttl = \"1m\"", `a.hcl:1: max_ttl: the ttl of 30m0s is over the max_ttl of 1m0s`},
		{"a.hcl", "\n\nttl = \"48h\"", `a.hcl:3: ttl: the ttl of 48h0m0s is over the max_ttl of 24h0m0s`},
		{"a.hcl", "ttl = \"-1s\"", `a.hcl:1: ttl: -1s is too short; it must be 5s or longer`},
		{"a.hcl", "cleanup_interval = \"999ms\"", `a.hcl:1: cleanup_interval: 999ms is too short; it must be 1s or longer`},
		{"a.hcl", "events { retention = \"59s\" }", `a.hcl:1: events.retention: 59s is too short; it must be 1m0s or longer`},
		{"a.hcl", "events { max = 999 }", `a.hcl:1: events.max: 999 is not from 1000 to 100000`},
		{"a.hcl", "events { max = 100001 }", `a.hcl:1: events.max: 100001 is not from 1000 to 100000`},
		{"a.hcl", "log_level = \"loud\"", `a.hcl:1: log_level: unknown level "loud" (available: trace, debug, info, warn, error)`},
		{"a.hcl", "instance = \"A\"", `a.hcl:1: instance: "A"`},
		{"a.hcl", "consul {\n  adress = \"x\"\n}", `a.hcl:2: Unsupported argument`},
		{"a.hcl", "\nconsul {\n  token      = \"a\"\n  token_file = \"/b\"\n}", `a.hcl:4: consul.token_file: set either token or token_file`},
		{"a.hcl", "vault {\n}", `a.hcl:1: Unsupported block type`},
		{"a.hcl", "ttl = \"${now}\"", `a.hcl:1: `},
		{"a.hcl", "ttl = ", `a.hcl:1: `},
		{"a.hcl", "\nplugin {\n}", `a.hcl:2: Missing name for plugin`},
		{"a.hcl", "\nplugin \"a b\" {\n}", `a.hcl:2: plugin.a b: its name is not 1 to 64 of a-z, 0-9 and '-'`},
		{"a.hcl", "plugin \"nomad\" {\n}", `a.hcl:1: plugin.nomad: nomad is a runtime of Bivouac itself`},
		{"a.hcl", "plugin \"x\" {\n}", `a.hcl:1: plugin.x: it has no path, and there is no plugin_dir`},
		{"a.hcl", "plugin \"x\" {\n  pth = \"/x\"\n}", `a.hcl:2: Unsupported argument`},
		{"a.hcl", "plugin \"x\" {\n  path = \"/x\"\n  sha256 = \"ab\"\n}", `a.hcl:1: plugin.x: sha256 "ab" is not 64 hex digits`},
		{"a.hcl", "plugin \"x\" {\n  path = \"/x\"\n  config {\n    a = b\n  }\n}", `a.hcl:4: Variables not allowed`},
		{"a.hcl", "plugin \"x\" {\n  path = \"/x\"\n  config {\n}\n  config {\n  }\n}", `a.hcl:5: Duplicate config block`},
		{"a.json", "{\"plugin\": {\n\"x\": {\n\"pth\": \"/x\"}}}", `a.json:3: Extraneous JSON object property`},
		{"a.json", "{\n\"tlt\": \"1h\"}", `a.json:2: Extraneous JSON object property`},
		{"a.json", "{\n\"ttl\": \"soon\"}", `a.json:2: Wrong value: ttl`},
		{"a.json", "{", `a.json:1: `},
	} {
		t.Run(test.text, func(t *testing.T) {
			path := write(t, test.name, test.text)
			_, err := load(t, "-config", path)
			must.ErrorContains(t, err, filepath.Dir(path)+"/"+test.want)
		})
	}
}

func TestAddressesOfServers(t *testing.T) {
	for _, address := range []string{"http://127.0.0.1:4646", "https://nomad.example", "http://[::1]:4646", "unix:///run/nomad.sock"} {
		_, err := load(t, "-config", write(t, "a.hcl", `nomad { address = "`+address+`" }`))
		must.NoError(t, err, must.Sprint(address))
	}
}

func TestJobVars(t *testing.T) {
	const want = `{"args":["-v","x y"],"cpu":500,"privileged":true,"ratio":1.5,"labels":{"team":"a"},"nothing":[],"image":"x"}`
	for name, text := range map[string]string{
		"a.hcl": `job_vars = {
			image      = "x"
			args       = ["-v", "x y"]
			cpu        = 500
			ratio      = 1.5
			privileged = true
			labels     = { team = "a" }
			nothing    = []
		}`,
		"a.json": `{"job_vars": ` + want + `}`,
	} {
		t.Run("are text, numbers, lists and maps in "+name, func(t *testing.T) {
			c, err := load(t, "-config", write(t, name, text))
			must.NoError(t, err)
			must.Eq(t, map[string]string{
				"image": "x", "args": `["-v","x y"]`, "cpu": "500", "ratio": "1.5", "privileged": "true", "labels": `{"team":"a"}`, "nothing": "[]",
			}, c.JobVars)
		})
	}
	t.Run("reach the template as they are, and -dev as well", func(t *testing.T) {
		args := []string{"plain", "${NOMAD_PORT_http}", "%{ if x }", `\b \\ "quoted"`, "\b\f\n\t\u2028<&>", "ä€😀", "$"}
		text, err := json.Marshal(map[string]any{"job_vars": map[string]any{"args": args}})
		must.NoError(t, err)
		c, err := load(t, "-config", write(t, "a.json", string(text)))
		must.NoError(t, err)

		expr, diags := hclsyntax.ParseExpression([]byte(c.JobVars["args"]), "value", hcl.InitialPos)
		must.False(t, diags.HasErrors(), must.Sprint(diags))
		value, diags := expr.Value(nil)
		must.False(t, diags.HasErrors(), must.Sprint(diags))
		var inHCL []string
		for _, element := range value.AsValueSlice() {
			inHCL = append(inHCL, element.AsString())
		}
		must.Eq(t, args, inHCL)

		var inJSON []string
		must.NoError(t, json.Unmarshal([]byte(c.JobVars["args"]), &inJSON))
		must.Eq(t, args, inJSON)
	})
}

func TestAFolderHoldsFilesThatAreNoneOfIts(t *testing.T) {
	folder := t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(folder, "a.hcl"), []byte(`ttl = "10m"`), 0o600))
	for _, name := range []string{".b.hcl", "a.hcl~", "#a.hcl#", ".a.hcl.swp"} {
		must.NoError(t, os.WriteFile(filepath.Join(folder, name), []byte(`not HCL`), 0o600))
	}
	// as emacs leaves it beside a file that is being changed
	must.NoError(t, os.Symlink("me@host.4711:1700000000", filepath.Join(folder, ".#a.hcl")))
	c, err := load(t, "-config", folder)
	must.NoError(t, err)
	must.Eq(t, 10*time.Minute, c.TTL)

	must.NoError(t, os.Symlink("nowhere", filepath.Join(folder, "b.hcl")))
	_, err = load(t, "-config", folder)
	must.ErrorContains(t, err, "b.hcl: no such file")
}

func TestAllMistakesAreToldAtOnce(t *testing.T) {
	_, err := load(t, "-config", write(t, "a.hcl", "tlt = 1\nttl = \"x\"\nconsul { x = 1 }"))
	must.Eq(t, 3, len(strings.Split(err.Error(), "\n")))
}

func TestWrongFlagsAreRefused(t *testing.T) {
	for _, test := range []struct{ arg, want string }{
		{"-ttl=soon", `"soon" is not a duration`},
		{"-log-json=perhaps", "must be true or false"},
		{"-job-var=image", "must have the form name=value"},
		{"-tlt=1h", "flag provided but not defined"},
		{"-http-addr=192.0.2.1:80", `-http-addr: http_addr: "192.0.2.1" is not a loopback address`},
		{"-http-addr=example.org:80", "not a loopback address"},
		{"-http-addr=:4747", "not a loopback address"},
		{"-http-addr=127.0.0.1", "must have the form HOST:PORT"},
		{"-http-addr=127.0.0.1:http", "is not a port"},
		{"-config=/no/such/file", "no such file"},
		{"-config=" + t.TempDir(), "contains no .hcl or .json file"},
	} {
		t.Run(test.arg, func(t *testing.T) {
			_, err := load(t, test.arg)
			must.ErrorContains(t, err, test.want)
		})
	}
}

func TestLoopbackAddresses(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "127.9.9.9:80", "[::1]:80", "localhost:4747", "[::ffff:127.0.0.1]:80"} {
		_, err := load(t, "-http-addr="+addr)
		must.NoError(t, err, must.Sprint(addr))
	}
}

func TestPublicHoldsNoSecrets(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", full), "-job-var", "env=secret")
	must.NoError(t, err)
	public := c.Public()
	must.Eq(t, "1h0m0s", public["ttl"].(string))
	must.Eq(t, []string{"env", "image", "port"}, public["job_vars"].([]string))
	must.Eq[any](t, map[string]any{
		"address": "https://127.0.0.1:8501", "token_file": "",
		"ca_file": "/etc/consul/ca.pem", "cert_file": "/etc/consul/client.pem", "key_file": "/etc/consul/client-key.pem", "tls_server_name": "server.dc1.consul",
		"datacenter": "dc1", "namespace": "chat", "partition": "east",
	}, public["consul"])
	must.Eq[any](t, map[string]any{
		"address": "https://user:xxxxx@127.0.0.1:4646", "token_file": "",
		"ca_file": "/etc/nomad-ca.pem", "cert_file": "/etc/nomad-cert.pem", "key_file": "/etc/nomad-key.pem",
		"tls_server_name": "server.global.nomad", "region": "global", "namespace": "bivouac",
		"helper_ca_file": "", "helper_cert_file": "", "helper_key_file": "", "helper_namespace": "",
	}, public["nomad"])
}

func FuzzFile(f *testing.F) {
	f.Add("a.hcl", full)
	f.Add("a.json", `{"ttl": "1h", "consul": [{"token": "t"}]}`)
	f.Fuzz(func(t *testing.T, name, text string) {
		c := Default()
		if err := c.parse(name, []byte(text)); err == nil {
			_ = c.check()
			must.NotNil(t, c.Public())
		}
	})
}
