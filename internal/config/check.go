package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bivouac/bivouac/runtime"
)

var logLevels = []string{"trace", "debug", "info", "warn", "error"}

// The limits of some settings. A shorter session may end before its caller learns of it.
// Each search for expired sessions costs a request to Consul.
const (
	minTTL             = 5 * time.Second
	minCleanupInterval = time.Second
	// A reader of events that is interrupted must be able to go on, and Consul keeps all
	// events in memory.
	minRetention         = time.Minute
	minEvents, maxEvents = 1000, 100_000
)

// check refuses values that are wrong whatever else is true. It tells all of
// them, each with the place where it was set. What is right for kv_prefix and
// consul.address, package consul says.
func (c *Config) check() error {
	var errs []error
	refuse := func(name, format string, args ...any) {
		errs = append(errs, c.Wrong(name, fmt.Errorf(format, args...)))
	}

	c.checkListener(refuse)
	if !runtime.ValidName(c.Runtime) {
		refuse("runtime", "%q is not a runtime's name", c.Runtime)
	}
	if c.TTL < minTTL {
		refuse("ttl", "%s is too short; it must be %s or longer", c.TTL, minTTL)
	}
	if c.MaxTTL < c.TTL {
		name := "ttl"
		if c.origins[name] == "" {
			name = "max_ttl"
		}
		refuse(name, "the ttl of %s is over the max_ttl of %s", c.TTL, c.MaxTTL)
	}
	if c.CleanupInterval < minCleanupInterval {
		refuse("cleanup_interval", "%s is too short; it must be %s or longer", c.CleanupInterval, minCleanupInterval)
	}
	if c.Events.Age < minRetention {
		refuse("events.retention", "%s is too short; it must be %s or longer", c.Events.Age, minRetention)
	}
	if c.Events.Max < minEvents || c.Events.Max > maxEvents {
		refuse("events.max", "%d is not from %d to %d", c.Events.Max, minEvents, maxEvents)
	}
	c.checkVolumeRoots(refuse)
	if c.Dev {
		c.checkDev(refuse)
	}
	if c.JobTemplate == "" {
		refuse("job_template", "must not be empty")
	}
	c.checkPlugins(refuse)
	c.checkAuth(refuse)
	c.checkAudits(refuse)
	c.checkPools(refuse)
	if !runtime.ValidName(c.Instance) {
		refuse("instance", "%q is not 1 to 64 of a-z, 0-9 and '-', or begins with '-'", c.Instance)
	}
	if !slices.Contains(logLevels, c.LogLevel) {
		refuse("log_level", "unknown level %q (available: %s)", c.LogLevel, strings.Join(logLevels, ", "))
	}
	for _, block := range []struct{ name, token, tokenFile, certFile, keyFile string }{
		{"consul", c.Consul.Token, c.Consul.TokenFile, c.Consul.CertFile, c.Consul.KeyFile},
		{"nomad", c.Nomad.Token, c.Nomad.TokenFile, c.Nomad.CertFile, c.Nomad.KeyFile},
	} {
		if block.token != "" && block.tokenFile != "" {
			refuse(block.name+".token_file", "set either token or token_file")
		}
		if (block.certFile == "") != (block.keyFile == "") {
			refuse(block.name, "set cert_file and key_file together")
		}
	}
	helper := []string{c.Nomad.HelperCAFile, c.Nomad.HelperCertFile, c.Nomad.HelperKeyFile}
	if some := strings.Join(helper, ""); some != "" && slices.Contains(helper, "") {
		refuse("nomad", "set helper_ca_file, helper_cert_file and helper_key_file together")
	}
	if c.Nomad.HelperNamespace != "" && c.Nomad.HelperCAFile == "" {
		refuse("nomad.helper_namespace", "it has no use without helper_ca_file, helper_cert_file and helper_key_file")
	}
	if !isAddress(c.Nomad.Address) {
		refuse("nomad.address", "%q is not an address such as http://127.0.0.1:4646, https://nomad.example:4646 or unix:///run/nomad.sock",
			withoutPassword(c.Nomad.Address))
	}
	return errors.Join(errs...)
}

// Wrong adds to err a key, such as "ttl" or "plugin.x", and the place where it was set.
func (c *Config) Wrong(name string, err error) error {
	return fmt.Errorf("%s: %s: %w", cmp.Or(c.origins[name], "default"), name, err)
}

// isAddress reports whether address is the URL of a server, or empty.
func isAddress(address string) bool {
	if address == "" {
		return true
	}
	u, err := url.Parse(address)
	if err != nil || u.RawQuery != "" || u.Fragment != "" {
		return false
	}
	switch u.Scheme {
	case "http", "https":
		_, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16)
		return err == nil && u.Hostname() != ""
	case "unix":
		return u.Host == "" && filepath.IsAbs(u.Path)
	default:
		return false
	}
}

// checkVolumeRoots refuses a root inside another one, because it would be a volume of the
// outer root, or inside such a volume.
func (c *Config) checkVolumeRoots(refuse func(name, format string, args ...any)) {
	for _, root := range c.VolumeRoots {
		if !filepath.IsAbs(root) || filepath.Clean(root) != root {
			refuse("volume_roots", "%q is not an absolute, clean path", root)
			continue
		}
		for _, outer := range c.VolumeRoots {
			if root != outer && strings.HasPrefix(root, strings.TrimSuffix(outer, "/")+"/") {
				refuse("volume_roots", "%q is inside the volume root %q, so a volume could be inside another one; use separate roots", root, outer)
			}
		}
	}
}

// checkDev refuses settings of jobs, because there are no jobs with dev.
func (c *Config) checkDev(refuse func(name, format string, args ...any)) {
	if c.Says("job_template") {
		refuse("job_template", "there are no jobs with dev; use job_vars command and args to set what its sandboxes run")
	}
	for _, name := range slices.Sorted(maps.Keys(c.JobVars)) {
		if name != "command" && name != "args" {
			refuse("job_vars", "unknown variable %q: with dev there are only command and args", name)
		}
	}
}
