package agent

import (
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

// withoutClaim is a driver without the ability claim.
type withoutClaim struct{ runtime.Driver }

func TestCheckPools(t *testing.T) {
	c := config.Config{Pools: []scheduler.Pool{{Name: "mine", Runtime: "fake", Size: 1}}}
	t.Run("accepts a driver that can claim spares", func(t *testing.T) {
		must.NoError(t, checkPools(c, map[string]runtime.Driver{"fake": fakeruntime.New("fake")}))
	})
	t.Run("refuses a driver that cannot", func(t *testing.T) {
		err := checkPools(c, map[string]runtime.Driver{"fake": withoutClaim{fakeruntime.New("fake")}})
		must.ErrorIs(t, err, errNoClaim)
		must.ErrorContains(t, err, `pool.mine: runtime "fake" cannot claim spares`)
	})
	t.Run("refuses a plugin that does not declare the ability", func(t *testing.T) {
		must.ErrorIs(t, checkClaims("mine", runtime.Info{Abilities: []runtime.Ability{runtime.AbilityLogs}}), errNoClaim)
		must.NoError(t, checkClaims("mine", runtime.Info{Abilities: []runtime.Ability{runtime.AbilityClaim}}))
	})
}
