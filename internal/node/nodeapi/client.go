package nodeapi

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/bivouac/bivouac/runtime"
)

// Client sends orders to node helpers. It is safe for concurrent use.
type Client struct {
	http http.Client
}

// New returns a client that sends orders with base's transport and within its timeout. The
// transport must present a client certificate, and must check that the helper's certificate
// has the name [ServerName].
func New(base *http.Client) *Client {
	own := *base
	// The helper never redirects, so a redirect comes from another server.
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	own.Jar = nil
	return &Client{http: own}
}

// Bind gives the order's sandbox to the order's chat: the volume appears at the target, and
// then the session file appears. A repeated Bind with the same order succeeds. address is
// the HOST:PORT of the helper on the sandbox's node.
//
// It returns [runtime.ErrConflict] if the sandbox was bound by another order,
// [runtime.ErrNotFound] if the sandbox does not run on the node, [runtime.ErrInvalid] if
// the order can never be carried out, such as for a volume that does not exist or is
// outside of the helper's volume roots, [runtime.ErrPermission] if the helper refuses the
// client's certificate, and [runtime.ErrUnavailable] otherwise. After ErrUnavailable the
// sandbox may be bound or not.
func (c *Client) Bind(ctx context.Context, address string, order Order) error {
	return c.send(ctx, address, PathBind, order)
}

// Look checks that the order's sandbox runs on the node, that it is not bound, and that a
// Bind could find all it needs in it. The helper remembers the sandbox, so that the Bind is
// faster. Its errors are those of Bind.
func (c *Client) Look(ctx context.Context, address string, order Order) error {
	return c.send(ctx, address, PathLook, order)
}

// Bound returns what the helper has bound. While that is still as in the [Bound] with the
// version known, it waits for [BoundWait] at most, and then returns that version without
// orders. known may be empty. Its errors are those of Bind; ErrNotFound means that the
// helper is too old to tell.
func (c *Client) Bound(ctx context.Context, address, known string) (Bound, error) {
	target := url.URL{Scheme: "https", Host: address, Path: PathBound, RawQuery: url.Values{"known": {known}}.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return Bound{}, fmt.Errorf("node helper: %w: %w", runtime.ErrInvalid, err)
	}
	text, err := c.do(req, http.StatusOK, MaxBound)
	if err != nil {
		return Bound{}, err
	}
	var bound Bound
	if err := json.Unmarshal(text, &bound); err != nil {
		return Bound{}, fmt.Errorf("node helper at %s: %w: its answer is not valid JSON: %w", address, runtime.ErrUnavailable, err)
	}
	return bound, nil
}

func (c *Client) send(ctx context.Context, address, path string, order Order) error {
	body, err := json.Marshal(order)
	if err != nil {
		return fmt.Errorf("node helper: %w: %w", runtime.ErrInvalid, err)
	}
	target := url.URL{Scheme: "https", Host: address, Path: path}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("node helper: %w: %w", runtime.ErrInvalid, err)
	}
	req.Header.Set("Content-Type", "application/json")
	_, err = c.do(req, http.StatusNoContent, MaxBody)
	return err
}

// do makes a request, and returns the answer if it has the status want. Of a longer answer
// it returns limit bytes.
func (c *Client) do(req *http.Request, want int, limit int64) ([]byte, error) {
	address := req.URL.Host
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("node helper: %w: %w", runtime.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	if err != nil {
		return nil, fmt.Errorf("node helper at %s: %w: %w", address, runtime.ErrUnavailable, err)
	}
	if resp.StatusCode == want {
		return text, nil
	}
	var answer Error
	if json.Unmarshal(text, &answer) != nil || answer.Message == "" {
		answer.Message = resp.Status
	}
	kind := kindOf(resp.StatusCode)
	return nil, fmt.Errorf("node helper at %s: %w: %s", address, kind, strings.TrimPrefix(answer.Message, kind.Error()+": "))
}

// kindOf returns the error that a status of the helper means.
func kindOf(status int) error {
	switch status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return runtime.ErrInvalid
	case http.StatusUnauthorized, http.StatusForbidden:
		return runtime.ErrPermission
	case http.StatusNotFound:
		return runtime.ErrNotFound
	case http.StatusConflict:
		return runtime.ErrConflict
	default:
		return runtime.ErrUnavailable
	}
}
