package api

import (
	"net/http"

	"github.com/bivouac/bivouac/internal/api/wire"
)

func (a *API) pools(w http.ResponseWriter, r *http.Request, _ query) error {
	all, err := a.config.Sessions.Pools(r.Context())
	if err != nil {
		return err
	}
	body := wire.PoolsAnswer{Pools: make([]wire.Pool, len(all))} // not nil, which would become null
	for i, p := range all {
		body.Pools[i] = wire.Pool{
			Name: p.Name, Runtime: p.Runtime, Size: p.Size, Ready: p.Ready, Starting: p.Starting, Ending: p.Ending,
		}
	}
	return writeJSON(w, http.StatusOK, body)
}
