package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

var (
	instanceForm = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
	logLevels    = []string{"trace", "debug", "info", "warn", "error"}
)

// check refuses values that are wrong whatever else is true. It tells all of
// them, each with the place where it was set.
func (c *Config) check() error {
	var errs []error
	refuse := func(name, format string, args ...any) {
		origin := c.origins[name]
		if origin == "" {
			origin = "default"
		}
		errs = append(errs, fmt.Errorf("%s: %s: %s", origin, name, fmt.Sprintf(format, args...)))
	}

	if err := checkLoopback(c.HTTPAddr); err != nil {
		refuse("http_addr", "%v", err)
	}
	if !instanceForm.MatchString(c.Runtime) {
		refuse("runtime", "%q is not a runtime's name", c.Runtime)
	}
	if c.TTL <= 0 {
		refuse("ttl", "%s is not over 0", c.TTL)
	}
	if c.MaxTTL < c.TTL {
		name := "ttl"
		if c.origins[name] == "" {
			name = "max_ttl"
		}
		refuse(name, "the ttl of %s is over the max_ttl of %s", c.TTL, c.MaxTTL)
	}
	if c.CleanupInterval <= 0 {
		refuse("cleanup_interval", "%s is not over 0", c.CleanupInterval)
	}
	c.checkVolumeRoots(refuse)
	if c.InProcess && !c.Dev {
		refuse("in_process", "it goes with dev alone")
	}
	if c.Dev {
		c.checkDev(refuse)
	}
	if c.JobTemplate == "" {
		refuse("job_template", "it is empty")
	}
	c.checkPlugins(refuse)
	if strings.Trim(c.KVPrefix, "/") == "" || strings.Contains(c.KVPrefix, "//") {
		refuse("kv_prefix", "%q is not a path of folders", c.KVPrefix)
	}
	if !instanceForm.MatchString(c.Instance) {
		refuse("instance", "%q is not 1 to 64 of a-z, 0-9 and -", c.Instance)
	}
	if !slices.Contains(logLevels, c.LogLevel) {
		refuse("log_level", "%q is none of %s", c.LogLevel, strings.Join(logLevels, ", "))
	}
	return errors.Join(errs...)
}

// checkVolumeRoots refuses roots that do not keep volumes apart: one root inside
// another would be a volume of the outer root, or inside one.
func (c *Config) checkVolumeRoots(refuse func(name, format string, args ...any)) {
	for _, root := range c.VolumeRoots {
		if !filepath.IsAbs(root) || filepath.Clean(root) != root {
			refuse("volume_roots", "%q is not an absolute, clean path", root)
			continue
		}
		for _, outer := range c.VolumeRoots {
			if root != outer && strings.HasPrefix(root, strings.TrimSuffix(outer, "/")+"/") {
				refuse("volume_roots", "%q is inside the volume root %q, so volumes could be inside one another; name roots that are apart", root, outer)
			}
		}
	}
}

// checkDev refuses what is said of jobs where there are none.
func (c *Config) checkDev(refuse func(name, format string, args ...any)) {
	if c.Says("job_template") {
		refuse("job_template", "there are no jobs with dev; job_vars command and args say what its sandboxes run")
	}
	for _, name := range slices.Sorted(maps.Keys(c.JobVars)) {
		if name != "command" && name != "args" {
			refuse("job_vars", "there are no jobs with dev, and so no %q; its sandboxes have command and args", name)
		}
	}
}

// checkLoopback refuses an address that others could reach: as long as there is
// no authentication, whoever reaches the API commands it. Names other than
// localhost are refused, since they may stand for anything later.
func checkLoopback(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not of the form host:port", addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q is not a port", port)
	}
	if host == "localhost" {
		return nil
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.Unmap().IsLoopback() {
		return fmt.Errorf("%q is not a loopback address; there is no authentication yet, so no other is allowed", host)
	}
	return nil
}
