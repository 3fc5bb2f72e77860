// Package config loads the server's configuration from flags, files and defaults. [Flags]
// registers the flags, and [Flags.Load] reads the files and checks the result. Flags
// override files, and files override defaults. Consul and Nomad addresses can also be set
// through CONSUL_HTTP_* and NOMAD_*; fields that are empty here are left to these.
//
// The package does not use the values.
package config

import (
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/scheduler"
)

// Config is the configuration of a Bivouac server.
type Config struct {
	// Dev asks for an agent that needs nothing else: records in memory,
	// sandboxes as processes of this machine.
	Dev bool

	HTTPAddrs       []string // HOST:PORT or unix:///PATH
	HostNames       []string // without port
	UnixSockets     UnixSockets
	TLS             TLS
	Runtime         string
	TTL             time.Duration
	MaxTTL          time.Duration
	CleanupInterval time.Duration
	VolumeRoots     []string
	JobTemplate     string
	JobVars         map[string]string
	PluginDir       string
	Plugins         []pluginhost.Plugin
	MaxSessions     int              // 0: no limit
	Pools           []scheduler.Pool // each has a size
	Policies        []Policy
	Tokens          []Token
	JWTs            []JWT
	Audits          []Audit
	KVPrefix        string
	Instance        string
	LogLevel        string
	LogJSON         bool
	Events          scheduler.Retention
	Consul          Consul
	Nomad           Nomad

	origins map[string]string // where each key was last set, for messages
}

// Consul is the connection to Consul. Empty fields are left to Consul's environment
// variables.
type Consul struct {
	Address       string
	Token         string
	TokenFile     string // read again when it changes; not together with Token
	CAFile        string // PEM files, read again when they change
	CertFile      string
	KeyFile       string
	TLSServerName string
	Datacenter    string
	Namespace     string
	Partition     string
}

// Nomad is the connection to Nomad. Empty fields are left to Nomad's environment
// variables.
type Nomad struct {
	Address       string
	Token         string
	TokenFile     string
	CAFile        string
	CertFile      string
	KeyFile       string
	TLSServerName string
	Region        string
	Namespace     string

	// The node helpers, which the pools of the runtime nomad need. The three files are set
	// together.
	HelperCAFile    string
	HelperCertFile  string
	HelperKeyFile   string
	HelperNamespace string
}

// Default returns the default configuration.
func Default() Config {
	return Config{
		HTTPAddrs:       []string{"127.0.0.1:4747"},
		UnixSockets:     UnixSockets{Mode: "0600"},
		TLS:             TLS{MinVersion: "tls12"},
		Runtime:         "nomad",
		TTL:             30 * time.Minute,
		MaxTTL:          24 * time.Hour,
		CleanupInterval: 15 * time.Second,
		JobTemplate:     "docker",
		KVPrefix:        "bivouac/",
		Instance:        "default",
		LogLevel:        "info",
		Events:          scheduler.Retention{}.OrDefault(),
	}
}

// key is a setting. Its target is a *string, a *bool, an *int, a *time.Duration, a *[]string, a
// *map[string]string or a *map[string][]string.
type key struct {
	name   string // in files
	flag   string // empty: files only
	target any
	usage  string
}

func (c *Config) keys() []key {
	return []key{
		{"dev", "dev", &c.Dev, "Run without Nomad and Consul: records in memory, sandboxes as local processes. Everything ends with the server."},
		{"http_addr", "http-addr", &c.HTTPAddrs, "`ADDRESS` of the API, HOST:PORT or unix:///PATH. May be repeated. Without authentication only loopback and unix sockets are allowed."},
		{"host_names", "host-name", &c.HostNames, "`NAME` of the server that the Host header may have. May be repeated. Loopback and the names in http_addr are always allowed."},
		{"runtime", "runtime", &c.Runtime, "`NAME` of the default runtime: nomad, process (with -dev), or a plugin."},
		{"ttl", "ttl", &c.TTL, "Default session TTL, as a `DURATION`."},
		{"max_ttl", "max-ttl", &c.MaxTTL, "Longest TTL that a caller may ask for, as a `DURATION`."},
		{"max_sessions", "max-sessions", &c.MaxSessions, "`NUMBER` of sessions that all AI agents together may have; 0 means no limit."},
		{"cleanup_interval", "cleanup-interval", &c.CleanupInterval, "`DURATION` between two cleanups of expired sessions."},
		{"volume_roots", "volume-root", &c.VolumeRoots, "`FOLDER` whose direct subfolders may be volumes. May be repeated. Only the name is checked: a symbolic link on the node is followed. (default any folder)"},
		{"job_template", "job-template", &c.JobTemplate, "`NAME|FILE` of the job template: docker, exec, raw_exec, or a file."},
		{"job_vars", "job-var", &c.JobVars, "`NAME=VALUE` of a job template variable. May be repeated. With -dev only command and args exist."},
		{"plugin_dir", "plugin-dir", &c.PluginDir, "`FOLDER` of the plugins. Only plugins with a block in a configuration file run."},
		{"kv_prefix", "kv-prefix", &c.KVPrefix, "`PREFIX` of all keys in Consul KV."},
		{"instance", "instance", &c.Instance, "`NAME` of this Bivouac, shared by its replicas."},
		{"log_level", "log-level", &c.LogLevel, "`LEVEL` of the log: trace, debug, info, warn or error."},
		{"log_json", "log-json", &c.LogJSON, "Write the log as JSON."},
	}
}

func (c *Config) blocks() map[string][]key {
	blocks := map[string][]key{
		"events": {
			{name: "retention", target: &c.Events.Age, usage: "`DURATION` for which events are kept, at least a minute. All replicas should have the same settings."},
			{name: "max", target: &c.Events.Max, usage: "`NUMBER` of events that are kept, from 1,000 to 100,000; older ones are dropped, up to 64 at a time."},
		},
		"consul": {
			{name: "address", target: &c.Consul.Address, usage: "`HOST:PORT` or URL of Consul: http, https, or unix:///PATH of a socket. (default from CONSUL_HTTP_ADDR)"},
			{name: "token", target: &c.Consul.Token, usage: "ACL token. (default from CONSUL_HTTP_TOKEN)"},
			{name: "token_file", target: &c.Consul.TokenFile, usage: "`FILE` with the ACL token, read again when it changes. (default from CONSUL_HTTP_TOKEN_FILE)"},
			{name: "ca_file", target: &c.Consul.CAFile, usage: "PEM `FILE` of the CAs to trust, read again when it changes. (default from CONSUL_CACERT)"},
			{name: "cert_file", target: &c.Consul.CertFile, usage: "PEM `FILE` of the client certificate, read again when it changes. (default from CONSUL_CLIENT_CERT)"},
			{name: "key_file", target: &c.Consul.KeyFile, usage: "PEM `FILE` of its key, read again when it changes. (default from CONSUL_CLIENT_KEY)"},
			{name: "tls_server_name", target: &c.Consul.TLSServerName, usage: "`NAME` that Consul's certificate must have. (default from CONSUL_TLS_SERVER_NAME)"},
			{name: "datacenter", target: &c.Consul.Datacenter, usage: "`NAME` of the Consul agent's datacenter. (default that of the agent)"},
			{name: "namespace", target: &c.Consul.Namespace, usage: "`NAME` of the Consul Enterprise namespace of keys and sessions. (default from CONSUL_NAMESPACE)"},
			{name: "partition", target: &c.Consul.Partition, usage: "`NAME` of the Consul Enterprise admin partition. (default from CONSUL_PARTITION)"},
		},
		"nomad": {
			{name: "address", target: &c.Nomad.Address, usage: "URL of Nomad: http, https, or unix:///PATH of a socket. (default from NOMAD_ADDR)"},
			{name: "token", target: &c.Nomad.Token, usage: "ACL token. (default from NOMAD_TOKEN)"},
			{name: "token_file", target: &c.Nomad.TokenFile, usage: "`FILE` with the ACL token, read again when it changes."},
			{name: "ca_file", target: &c.Nomad.CAFile, usage: "PEM `FILE` of the CAs to trust, read again when it changes. (default from NOMAD_CACERT)"},
			{name: "cert_file", target: &c.Nomad.CertFile, usage: "PEM `FILE` of the client certificate, read again when it changes. (default from NOMAD_CLIENT_CERT)"},
			{name: "key_file", target: &c.Nomad.KeyFile, usage: "PEM `FILE` of its key, read again when it changes. (default from NOMAD_CLIENT_KEY)"},
			{name: "tls_server_name", target: &c.Nomad.TLSServerName, usage: "`NAME` that Nomad's certificate must have. (default from NOMAD_TLS_SERVER_NAME)"},
			{name: "region", target: &c.Nomad.Region, usage: "`NAME` of the region that runs the sandboxes. (default from NOMAD_REGION)"},
			{name: "namespace", target: &c.Nomad.Namespace, usage: "`NAME` of the namespace that runs the sandboxes. (default from NOMAD_NAMESPACE)"},
			{name: "helper_ca_file", target: &c.Nomad.HelperCAFile, usage: "PEM `FILE` of the CAs of the node helpers (bivouac node), which pools need. Read again when it changes, as are the other two."},
			{name: "helper_cert_file", target: &c.Nomad.HelperCertFile, usage: "PEM `FILE` of this server's certificate for the node helpers."},
			{name: "helper_key_file", target: &c.Nomad.HelperKeyFile, usage: "PEM `FILE` of its key."},
			{name: "helper_namespace", target: &c.Nomad.HelperNamespace, usage: "`NAME` of the namespace of the job that runs the node helpers. (default that of the sandboxes)"},
		},
	}
	maps.Copy(blocks, c.listenerBlocks())
	return blocks
}

// setBy records where a key was set.
func (c *Config) setBy(name, origin string) {
	if c.origins == nil {
		c.origins = map[string]string{}
	}
	c.origins[name] = origin
}

// Says reports whether a file or a flag sets any of these keys or blocks.
func (c *Config) Says(names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return c.origins[name] != "" })
}

// Public returns the configuration without secrets. It leaves out tokens, the values of
// job variables, and the plugins' arguments, environment and configuration, which may be
// secrets too.
func (c *Config) Public() map[string]any {
	public := map[string]any{}
	for _, k := range c.keys() {
		public[k.name] = shown(k)
	}
	for name, keys := range c.blocks() {
		block := map[string]any{}
		for _, k := range keys {
			if k.name != "token" {
				block[k.name] = shown(k)
			}
		}
		public[name] = block
	}
	public["plugin"] = c.publicPlugins()
	public["policy"], public["token"] = c.publicAuth()
	public["jwt"] = c.publicJWTs()
	public["audit"] = c.publicAudits()
	public["pool"] = c.publicPools()
	return public
}

func shown(k key) any {
	switch target := k.target.(type) {
	case *string:
		if k.name == "address" {
			return withoutPassword(*target)
		}
		return *target
	case *bool:
		return *target
	case *int:
		return *target
	case *time.Duration:
		return target.String()
	case *[]string:
		return append([]string{}, *target...)
	case *map[string]string:
		return append([]string{}, slices.Sorted(maps.Keys(*target))...)
	case *map[string][]string:
		return maps.Clone(*target)
	}
	return nil
}

func withoutPassword(address string) string {
	if !strings.Contains(address, "@") {
		return address
	}
	u, err := url.Parse(address)
	if err != nil || u.User == nil {
		return "redacted"
	}
	return u.Redacted()
}
