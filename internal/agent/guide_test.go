package agent

import (
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/config"
)

func TestGuideShowsWhatTheServerAsksFor(t *testing.T) {
	for name, test := range map[string]struct {
		configure func(*config.Config)
		want      string
		variables string // empty: no line about them
	}{
		"nothing": {func(*config.Config) {}, "curl -sS -X PUT URL/v1/", ""},
		"a token": {func(c *config.Config) { c.Tokens = []config.Token{{Name: "a"}} },
			`curl -sS -H "Authorization: Bearer $BIVOUAC_TOKEN" -X PUT URL/v1/`, "BIVOUAC_TOKEN"},
		"TLS": {func(c *config.Config) { c.TLS.CertFile = "cert.pem" },
			`curl -sS --cacert "$BIVOUAC_CACERT" -X PUT URL/v1/`, "BIVOUAC_CACERT"},
		"a client certificate": {func(c *config.Config) { c.TLS.CertFile, c.TLS.VerifyClient = "cert.pem", true },
			`curl -sS --cacert "$BIVOUAC_CACERT" --cert "$BIVOUAC_CLIENT_CERT" --key "$BIVOUAC_CLIENT_KEY" -X PUT URL/v1/`,
			"BIVOUAC_CACERT, BIVOUAC_CLIENT_CERT, BIVOUAC_CLIENT_KEY"},
	} {
		t.Run(name, func(t *testing.T) {
			c := config.Default()
			test.configure(&c)
			var out strings.Builder
			must.NoError(t, guide(Environment{Program: "bivouac", Stdout: &out}, c, "URL", devVolume{path: "/v"}))
			must.StrContains(t, out.String(), test.want)
			must.Eq(t, test.variables != "", strings.Contains(out.String(), "First export "+test.variables+".\n"))
		})
	}
}
