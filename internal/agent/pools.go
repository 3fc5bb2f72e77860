package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

// errNoClaim is wrapped in errors about pools whose runtime cannot claim spares.
var errNoClaim = errors.New("cannot claim spares")

// checkPools refuses a pool of a driver that cannot claim spares. What a plugin can do is
// known only while it runs.
func checkPools(c config.Config, drivers map[string]runtime.Driver) error {
	for _, pool := range c.Pools {
		if _, claims := drivers[pool.Runtime].(runtime.Claimer); !claims {
			return c.Wrong("pool."+pool.Name, fmt.Errorf("runtime %q %w", pool.Runtime, errNoClaim))
		}
	}
	return nil
}

// poolChecks returns a health check for each pool of a plugin, which fails if the plugin
// cannot claim spares. Creates start cold then.
func poolChecks(c config.Config, drivers map[string]*pluginhost.Driver) []api.Check {
	var checks []api.Check
	for _, pool := range c.Pools {
		driver, ok := drivers[pool.Runtime]
		if !ok {
			continue
		}
		checks = append(checks, api.Check{Name: "pool." + pool.Name, Optional: true, Run: func(ctx context.Context) error {
			info, err := driver.Info(ctx)
			if err != nil {
				return nil //nolint:nilerr // the check of the plugin reports it
			}
			if err := checkClaims(pool.Runtime, info); err != nil {
				return fmt.Errorf("creates start cold: %w", err)
			}
			return nil
		}})
	}
	return checks
}

// checkClaims returns an error if a plugin cannot claim spares.
func checkClaims(name string, info runtime.Info) error {
	if !slices.Contains(info.Abilities, runtime.AbilityClaim) {
		return fmt.Errorf("plugin %q %w", name, errNoClaim)
	}
	return nil
}
