package config

import (
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

func TestPools(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", `
plugin_dir = "/opt/plugins"
plugin "docker" {}
pool "default" {
  runtime = "nomad"
  size    = 10
}
pool "containers" {
  runtime = "docker"
  size    = 1000
}
`))
	must.NoError(t, err)
	must.Eq(t, []scheduler.Pool{{Name: "default", Runtime: "nomad", Size: 10}, {Name: "containers", Runtime: "docker", Size: 1000}}, c.Pools)
	must.Eq(t, any(map[string]any{
		"default":    map[string]any{"runtime": "nomad", "size": 10},
		"containers": map[string]any{"runtime": "docker", "size": 1000},
	}), c.Public()["pool"])

	c, err = load(t)
	must.NoError(t, err)
	must.SliceEmpty(t, c.Pools, must.Sprint("pools cost memory, so there are none by default"))
}

func TestPools_OfDev(t *testing.T) {
	dev := scheduler.Pool{Name: "dev", Runtime: "process", Size: 2}
	for name, c := range map[string]struct {
		blocks string
		want   []scheduler.Pool
	}{
		"is there by default":              {"", []scheduler.Pool{dev}},
		"can have another size":            {"pool \"mine\" {\n runtime = \"process\"\n size = 5\n}", []scheduler.Pool{{Name: "mine", Runtime: "process", Size: 5}}},
		"can be turned off":                {"pool \"dev\" {\n runtime = \"process\"\n size = 0\n}", []scheduler.Pool{}},
		"is not for a command of the user": {"job_vars = { command = \"/bin/sh\" }", nil},
		"is not that of a plugin":          {"runtime = \"mine\"\nplugin_dir = \"/opt\"\nplugin \"mine\" {}", nil},
	} {
		t.Run(name, func(t *testing.T) {
			c2, err := load(t, "-dev", "-config", write(t, "a.hcl", c.blocks))
			must.NoError(t, err)
			must.Eq(t, c.want, c2.Pools)
		})
	}
}

func TestWrongPoolsAreRefused(t *testing.T) {
	pool := func(name, runtime, size string) string {
		return "pool \"" + name + "\" {\n runtime = \"" + runtime + "\"\n size = " + size + "\n}\n"
	}
	for name, c := range map[string]struct{ blocks, want string }{
		"name":                      {pool("A b", "nomad", "1"), `"A b" is not 1 to 64 of a-z, 0-9 and '-'`},
		"negative size":             {pool("a", "nomad", "-1"), "size must be from 0 to 1000"},
		"no size":                   {`pool "a" { runtime = "nomad" }`, "size must be from 0 to 1000"},
		"too large":                 {pool("a", "nomad", "1001"), "size must be from 0 to 1000"},
		"no runtime":                {`pool "a" { size = 1 }`, `unknown runtime "" (available: nomad)`},
		"unknown runtime":           {pool("a", "docker", "1"), `unknown runtime "docker" (available: nomad)`},
		"a runtime of another mode": {pool("a", "process", "1"), `unknown runtime "process" (available: nomad)`},
		"two pools with one name":   {pool("a", "nomad", "1") + pool("a", "nomad", "1"), `pool "a" is already defined at`},
		"two pools for one runtime": {pool("a", "nomad", "1") + pool("b", "nomad", "1"), `pool "a" has the same runtime`},
		"an unknown key":            {"pool \"a\" {\n runtime = \"nomad\"\n size = 1\n min = 2\n}", `An argument named "min" is not expected`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, "-config", write(t, "a.hcl", c.blocks))
			must.ErrorContains(t, err, c.want)
			must.ErrorContains(t, err, "a.hcl:")
		})
	}
}
