package agent

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/config"
)

// deployFile returns a file of examples/deploy.
func deployFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../examples/deploy", name))
	must.NoError(t, err)
	return string(text)
}

// find returns what the group of the pattern matches first.
func find(t *testing.T, text, pattern string) string {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(text)
	must.Len(t, 2, m, must.Sprint(pattern))
	return m[1]
}

func TestDeployedServersGetTheTimeToStop(t *testing.T) {
	for what, given := range map[string]string{
		"systemd": find(t, deployFile(t, "bivouac.service"), `(?m)^TimeoutStopSec=(\d+)$`) + "s",
		"Nomad":   find(t, deployFile(t, "bivouac.nomad.hcl"), `(?m)^\s+kill_timeout = "(\w+)"$`),
	} {
		limit, err := time.ParseDuration(given)
		must.NoError(t, err)
		must.Greater(t, stopLimit, limit, must.Sprint(what))
	}
}

func TestDeployedConfigurationsAreValid(t *testing.T) {
	load := func(t *testing.T, text string) config.Config {
		file := filepath.Join(t.TempDir(), "bivouac.hcl")
		must.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		var flags config.Flags
		set := flag.NewFlagSet("agent", flag.ContinueOnError)
		flags.Register(set)
		must.NoError(t, set.Parse([]string{"-config=" + file}))
		c, err := flags.Load()
		must.NoError(t, err)
		return c
	}
	for name, text := range map[string]string{
		"that of the packages":  deployFile(t, "bivouac.hcl"),
		"that of the Nomad job": find(t, deployFile(t, "bivouac.nomad.hcl"), `(?s)<<-EOT\n(.*?)\n +EOT`),
	} {
		t.Run(name, func(t *testing.T) { must.NoError(t, Validate(t.Context(), load(t, text))) })
	}
	t.Run("the blocks of the page, together", func(t *testing.T) {
		var text string
		for _, block := range regexp.MustCompile("(?s)```hcl\n(.*?)```").FindAllStringSubmatch(deployFile(t, "PRODUCTION.md"), -1) {
			if !regexp.MustCompile(`^(client|template|check) \{`).MatchString(block[1]) { // those are Nomad's own
				text += block[1]
			}
		}
		must.NotEq(t, "", text)
		// Not Validate: the files of the page do not exist.
		load(t, strings.ReplaceAll(text, `"…"`, `"`+strings.Repeat("0", 64)+`"`))
	})
}
