package nomadmodel

import (
	"context"
	"net/http"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// WithoutRights returns the server as a client sees it whose token permits nothing. Nomad
// refuses all requests but two: anybody may ask for the leader, and an event stream is
// opened but brings nothing.
func (s *Server) WithoutRights() network.Server { return withoutRights{s} }

type withoutRights struct{ *Server }

// Serve answers a request.
func (s withoutRights) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	s.mu.Lock()
	leading := s.leading
	s.mu.Unlock()
	switch {
	case !leading || req.URL.Path == "/v1/status/leader":
		return s.Server.Serve(ctx, req, body)
	case req.URL.Path == "/v1/event/stream":
		resp := network.Answer(http.StatusOK, nil)
		resp.Body, resp.ContentLength = network.NewStream(ctx), -1
		return resp
	default:
		return network.Text(http.StatusForbidden, "Permission denied")
	}
}
