package config

import (
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func poolKeys(p *scheduler.Pool) []key {
	return []key{
		{name: "runtime", target: &p.Runtime, usage: "`NAME` of the runtime that the spares are for: nomad, process (with -dev), or a plugin that can claim spares. Each runtime has at most one pool. (default none: it must be set)"},
		{name: "size", target: &p.Size, usage: "`NUMBER` of spares to keep ready, 1 to 1000, or 0 for none. (default none: it must be set)"},
	}
}

func (c *Config) decodePool(block *hcl.Block) hcl.Diagnostics {
	p := scheduler.Pool{Name: block.Labels[0], Size: -1} // it must be set
	diags := c.decodeKeys(block.Body, hcl.BodySchema{}, "pool."+p.Name+".", poolKeys(&p), nil)
	c.Pools = append(c.Pools, p)
	return diags
}

// checkPools refuses invalid pools. It does not know whether a runtime can claim spares.
func (c *Config) checkPools(refuse func(name, format string, args ...any)) {
	known := c.Runtimes()
	pools := map[string]string{} // by runtime
	for _, p := range c.Pools {
		origin := "pool." + p.Name
		if !runtime.ValidName(p.Name) {
			refuse(origin, "%q is not 1 to 64 of a-z, 0-9 and '-', or begins with '-'", p.Name)
		}
		if p.Size < 0 || p.Size > scheduler.MaxPoolSize {
			refuse(origin, "size must be from 0 to %d", scheduler.MaxPoolSize)
		}
		if !slices.Contains(known, p.Runtime) {
			refuse(origin, "unknown runtime %q (available: %s)", p.Runtime, strings.Join(known, ", "))
		} else if other, used := pools[p.Runtime]; used {
			refuse(origin, "pool %q has the same runtime", other)
		}
		pools[p.Runtime] = p.Name
	}
}

// devPool returns the pool of a server with -dev whose configuration has no pool. It shows what
// a pool does. A command of the user gets no spares by default, because it may need its
// volume when it starts.
func devPool() scheduler.Pool { return scheduler.Pool{Name: "dev", Runtime: "process", Size: 2} }

// finishPools adds the pool of -dev and removes those of size 0. A block with size 0 turns
// the pool of -dev off.
func (c *Config) finishPools() {
	if c.Dev && c.Pools == nil && c.Runtime == devPool().Runtime && len(c.JobVars) == 0 {
		c.Pools = []scheduler.Pool{devPool()}
	}
	c.Pools = slices.DeleteFunc(c.Pools, func(p scheduler.Pool) bool { return p.Size == 0 })
}

// Runtimes returns the names of the runtimes that the server can have: the one that is part
// of Bivouac, and the plugins.
func (c *Config) Runtimes() []string {
	names := []string{"nomad"}
	if c.Dev {
		names = []string{"process"}
	}
	for _, p := range c.Plugins {
		names = append(names, p.Name)
	}
	return names
}

func (c *Config) publicPools() map[string]any {
	public := map[string]any{}
	for _, p := range c.Pools {
		public[p.Name] = shownAll(poolKeys(&p))
	}
	return public
}
