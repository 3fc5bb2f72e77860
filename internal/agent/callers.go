package agent

import (
	"slices"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/auth"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
)

// callers is what finds out who calls.
type callers struct {
	authenticator *auth.Authenticator // nil if nobody must authenticate
	parts         []part              // read the keys of JWTs
	credentials   map[string]credentials.Reloader
	checks        []api.Check
}

// newCallers reads the files of tokens and keys, and makes no request. nomad is nil if
// nothing else uses Nomad.
func newCallers(c config.Config, nomad *nomadConnection, log hclog.Logger) (callers, error) {
	all := callers{credentials: map[string]credentials.Reloader{}}
	if !c.Authenticates() {
		return all, nil
	}
	tokens, err := c.Callers()
	if err != nil {
		return callers{}, err
	}
	if nomad == nil && slices.ContainsFunc(c.JWTs, func(j config.JWT) bool { return j.Nomad }) {
		connection, err := connectNomad(c)
		if err != nil {
			return callers{}, err
		}
		nomad, all.credentials = &connection, connection.credentials
	}
	var jwts []auth.JWT
	// Blocks that differ only in who may do what have the same keys.
	type source struct {
		nomad         bool
		url, ca, file string
	}
	known := map[source]*auth.Keys{}
	for _, j := range c.JWTs {
		from := source{j.Nomad, j.JWKSURL, j.JWKSCAFile, j.PublicKeysFile}
		keys := known[from]
		if keys == nil {
			if keys, err = newKeys(j, nomad, log.Named("jwt")); err != nil {
				return callers{}, c.Wrong("jwt."+j.Name, err)
			}
			known[from] = keys
			if j.PublicKeysFile != "" {
				all.credentials["jwt_"+j.Name] = keys
			} else {
				all.parts = append(all.parts, part{"keys of jwt " + j.Name, keys.Run})
			}
		}
		jwts = append(jwts, auth.JWT{
			Name: j.Name, Keys: keys, Issuer: j.Issuer, Audiences: j.Audiences, BoundClaims: j.BoundClaims,
			Algorithms: j.Algorithms, Leeway: j.Leeway, NameClaim: j.NameClaim, Policies: c.PoliciesNamed(j.Policies),
		})
	}
	all.authenticator = auth.New(tokens, jwts)
	if len(jwts) > 0 {
		all.checks = []api.Check{{Name: "jwt", Run: all.authenticator.Health, Optional: true}}
	}
	return all, nil
}

func newKeys(j config.JWT, nomad *nomadConnection, log hclog.Logger) (*auth.Keys, error) {
	switch {
	case j.Nomad:
		return auth.NomadKeys(nomad.client, nomad.token.Value, log), nil
	case j.JWKSURL != "":
		return auth.URLKeys(j.JWKSURL, j.JWKSCAFile, log)
	default:
		return auth.FileKeys(j.PublicKeysFile, log)
	}
}
