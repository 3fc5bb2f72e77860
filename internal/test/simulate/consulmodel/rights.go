package consulmodel

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// WithoutRights returns the server as a client sees it whose token permits
// nothing. Consul refuses most requests. For two it silently leaves out what
// the client may not read: reads in a transaction, and lists of key names.
func (s *Server) WithoutRights() network.Server { return withoutRights{s} }

type withoutRights struct{ *Server }

// Serve answers a request.
func (s withoutRights) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	s.mu.Lock()
	leading, kvIndex := s.leading, s.kvIndex
	s.mu.Unlock()
	key, isKey := strings.CutPrefix(req.URL.Path, "/v1/kv/")
	switch {
	case !leading:
	case req.URL.Path == "/v1/txn":
		return s.serveTxn(body)
	case isKey && req.URL.Query().Has("keys"):
		return answer(http.StatusNotFound, kvIndex, nil)
	case isKey && req.Method == http.MethodGet:
		return network.Text(http.StatusForbidden, denied("key:read", key))
	case isKey:
		return network.Text(http.StatusForbidden, denied("key:write", key))
	case strings.HasPrefix(req.URL.Path, "/v1/session/"):
		return network.Text(http.StatusForbidden, denied("session:write", "consul-0"))
	}
	return s.Server.Serve(ctx, req, body)
}

func (s withoutRights) serveTxn(body []byte) *http.Response {
	var ops []struct{ KV *api.KVTxnOp }
	if err := json.Unmarshal(body, &ops); err != nil {
		return network.Text(http.StatusBadRequest, err.Error())
	}
	var errs []txnError
	for i, op := range ops {
		switch op.KV.Verb {
		case api.KVGet, api.KVGetOrEmpty, api.KVGetTree:
		case api.KVCheckIndex, api.KVCheckSession:
			errs = append(errs, txnError{i, denied("key:read", op.KV.Key)})
		default:
			errs = append(errs, txnError{i, denied("key:write", op.KV.Key)})
		}
	}
	if len(errs) > 0 {
		return rolledBack(errs)
	}
	return answer(http.StatusOK, 0, map[string]any{"Results": []txnResult{}, "Errors": nil})
}

func denied(permission, what string) string {
	return fmt.Sprintf("Permission denied: anonymous token lacks permission '%s' on %q. "+
		"The anonymous token is used implicitly when a request does not specify a token.", permission, what)
}
