package agent

import (
	"net/http"
	"net/http/httptest"
	"testing"

	nomadapi "github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/store/consul"
)

func TestPlace(t *testing.T) {
	for name, test := range map[string]struct {
		region, namespace string
		regions, self     string // what Nomad answers
		optional          bool
		want              consul.Place
	}{
		"is what is configured":                       {region: "eu", namespace: "boxes", want: consul.Place{Region: "eu", Namespace: "boxes"}},
		"is Nomad's only region":                      {regions: `["global"]`, want: consul.Place{Region: "global", Namespace: "default"}},
		"is the region of the agent that is asked":    {regions: `["eu","us"]`, self: `{"config":{"Region":"us"}}`, want: consul.Place{Region: "us", Namespace: "default"}},
		"is unknown if the token may not ask":         {regions: `["eu","us"]`, want: consul.Place{Namespace: "default"}},
		"is not asked for by one that needs no Nomad": {optional: true, want: consul.Place{Namespace: "default"}},
	} {
		t.Run(name, func(t *testing.T) {
			nomad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				answer := map[string]string{"/v1/regions": test.regions, "/v1/agent/self": test.self}[r.URL.Path]
				if answer == "" {
					http.Error(w, "Permission denied", http.StatusForbidden)
					return
				}
				_, _ = w.Write([]byte(answer))
			}))
			t.Cleanup(nomad.Close)
			client, err := nomadapi.NewClient(&nomadapi.Config{Address: nomad.URL})
			must.NoError(t, err)
			got, err := place(client, credentials.NewToken(""), test.region, test.namespace, !test.optional)(t.Context())
			must.NoError(t, err)
			must.Eq(t, test.want, got)
		})
	}
	t.Run("is not known while Nomad does not answer", func(t *testing.T) {
		nomad := httptest.NewServer(http.NotFoundHandler())
		nomad.Close()
		client, err := nomadapi.NewClient(&nomadapi.Config{Address: nomad.URL})
		must.NoError(t, err)
		_, err = place(client, credentials.NewToken(""), "", "", true)(t.Context())
		must.ErrorContains(t, err, "list the regions of Nomad")
	})
}
