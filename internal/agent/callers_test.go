package agent

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/config"
)

func TestCallers(t *testing.T) {
	public, _, err := ed25519.GenerateKey(nil)
	must.NoError(t, err)
	der, err := x509.MarshalPKIXPublicKey(public)
	must.NoError(t, err)
	file := filepath.Join(t.TempDir(), "keys.pem")
	must.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600))
	with := func(jwts ...config.JWT) config.Config {
		c := config.Default()
		c.JWTs = jwts
		return c
	}

	t.Run("nobody_must_authenticate_without_blocks", func(t *testing.T) {
		all, err := newCallers(with(), nil, hclog.NewNullLogger())
		must.NoError(t, err)
		must.Nil(t, all.authenticator)
		must.SliceEmpty(t, all.checks)
	})
	t.Run("blocks_with_the_same_source_share_its_keys", func(t *testing.T) {
		all, err := newCallers(with(
			config.JWT{Name: "a", JWKSURL: "https://sso.example.org"},
			config.JWT{Name: "b", JWKSURL: "https://sso.example.org"},
			config.JWT{Name: "c", JWKSURL: "https://other.example.org"},
			config.JWT{Name: "d", Nomad: true},
			config.JWT{Name: "e", Nomad: true},
			config.JWT{Name: "f", PublicKeysFile: file},
			config.JWT{Name: "g", PublicKeysFile: file},
		), nil, hclog.NewNullLogger())
		must.NoError(t, err)
		must.NotNil(t, all.authenticator)
		must.Len(t, 3, all.parts) // two URLs and Nomad
		must.MapContainsKeys(t, all.credentials, []string{"jwt_f"})
		must.MapLen(t, 1, all.credentials)
		must.Len(t, 1, all.checks)
		must.True(t, all.checks[0].Optional)
		must.ErrorContains(t, all.checks[0].Run(t.Context()), `jwt "d": no keys from Nomad`)
	})
	t.Run("a_file_without_keys_is_named", func(t *testing.T) {
		c := with(config.JWT{Name: "a", PublicKeysFile: file + ".missing"})
		_, err := newCallers(c, nil, hclog.NewNullLogger())
		must.ErrorContains(t, err, "jwt.a: ")
		must.ErrorIs(t, err, os.ErrNotExist)
		must.ErrorIs(t, Validate(t.Context(), c), os.ErrNotExist)
	})
}
