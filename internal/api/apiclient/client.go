// Package apiclient is a client of the Control API.
//
// [New] returns a [Client]. Each of its methods makes one request.
//
// The package does not retry or cache anything.
package apiclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

// maxAnswer bounds the size of a response, in bytes. A full page of the longest possible
// sessions is smaller, even with every byte escaped.
const maxAnswer = 64 << 20

// Client calls the API of one Bivouac server. It is safe for concurrent use.
type Client struct {
	base  *url.URL
	http  *http.Client
	token string
}

// New returns a client of the server at an address such as "127.0.0.1:4747",
// "https://bivouac.example:4747" or "unix:///run/bivouac/api.sock". If transport is nil,
// it uses http.DefaultTransport, or for a unix socket its own. Only the context of a call
// limits its time, because a create or a blocking read may take minutes.
func New(address string, transport http.RoundTripper) (*Client, error) {
	base, socket, err := parseAddress(address)
	if err != nil {
		return nil, err
	}
	if socket != "" && transport == nil {
		transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}
	}
	return &Client{
		base: base,
		http: &http.Client{
			Transport: transport,
			// The API never redirects, so a redirect comes from another server.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// WithToken returns a client that also sends a token with each request. It does not check
// whether the token is valid.
func (c *Client) WithToken(token string) *Client {
	with := *c
	with.token = token
	return &with
}

// parseAddress returns the URL of a server, and the path of its socket if it has one.
func parseAddress(address string) (base *url.URL, socket string, err error) {
	full := address
	if !strings.Contains(full, "://") {
		full = "http://" + full
	}
	u, err := url.Parse(full)
	if err != nil {
		return nil, "", fmt.Errorf("address of the server: %w", err)
	}
	plain := u.RawQuery == "" && u.Fragment == "" && u.User == nil
	switch {
	case (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && strings.Trim(u.Path, "/") == "" && plain:
		return &url.URL{Scheme: u.Scheme, Host: u.Host}, "", nil
	case u.Scheme == "unix" && u.Host == "" && path.IsAbs(u.Path) && plain:
		return &url.URL{Scheme: "http", Host: "localhost"}, u.Path, nil
	default:
		return nil, "", fmt.Errorf("address of the server: %q must have the form http://HOST:PORT, https://HOST:PORT or unix:///PATH", address)
	}
}

// CreateInput describes the session to create.
type CreateInput struct {
	AgentID        string
	VolumeHostPath string
	Runtime        string            // empty: any for an existing session, the server's default for a new one
	TTL            time.Duration     // 0: the server's default
	Labels         map[string]string // nil: none for a new session, any for an existing one
	// Progress gets each stage of a start as it is reached, one call at a time
	// and none after Create returned. It may be nil.
	Progress func(runtime.Stage)
}

// Create creates or reuses the chat's session, and returns once its sandbox is ready.
func (c *Client) Create(ctx context.Context, chatID uuid.UUID, in CreateInput) (wire.CreateAnswer, error) {
	req := request{
		method: http.MethodPut,
		path:   sessionPath(chatID),
		body: wire.CreateRequest{
			AgentID: in.AgentID, VolumeHostPath: in.VolumeHostPath, Runtime: in.Runtime, TTL: duration(in.TTL), Labels: in.Labels,
		},
	}
	callCtx := ctx
	if in.Progress != nil {
		var end func()
		callCtx, end = traceStages(ctx, in.Progress)
		defer end()
		req.header = http.Header{wire.HeaderStages: {"true"}}
	}
	var out wire.CreateAnswer
	_, err := c.call(callCtx, req, &out)
	return out, err
}

// Block makes a read wait for a change.
type Block struct {
	Index uint64        // the index that the read before returned; 0: do not wait
	Wait  time.Duration // at most 10 minutes; 0: the server's default, 5 minutes
}

func (b Block) query() url.Values {
	q := url.Values{}
	if b.Index != 0 {
		q.Set("index", strconv.FormatUint(b.Index, 10))
	}
	if b.Wait != 0 {
		q.Set("wait", b.Wait.String())
	}
	return q
}

// Get returns the chat's session, and the index for a next, blocking Get. If the chat has
// no session, it returns an *Error with code wire.CodeNotFound, and also an index.
func (c *Client) Get(ctx context.Context, chatID uuid.UUID, block Block) (wire.GetAnswer, uint64, error) {
	var out wire.GetAnswer
	index, err := c.call(ctx, request{method: http.MethodGet, path: sessionPath(chatID), query: block.query()}, &out)
	return out, index, err
}

// MaxPerPage is the maximum number of sessions on a page.
const MaxPerPage = 1000

// ListInput selects a page of sessions.
type ListInput struct {
	AgentID   string // empty: the sessions of all AI agents
	State     string // empty: any
	Text      string // in any case, in the chat ID, agent ID, labels or reason; empty: any
	PerPage   int    // at most MaxPerPage; 0: the server's default, 100
	NextToken string // from the page before; empty: the first page
	Block     Block
}

// List returns a page of sessions, and the index for a next, blocking List.
func (c *Client) List(ctx context.Context, in ListInput) (wire.ListAnswer, uint64, error) {
	q := in.Block.query()
	if in.AgentID != "" {
		q.Set("agent_id", in.AgentID)
	}
	if in.State != "" {
		q.Set("state", in.State)
	}
	if in.Text != "" {
		q.Set("text", in.Text)
	}
	if in.PerPage != 0 {
		q.Set("per_page", strconv.Itoa(in.PerPage))
	}
	if in.NextToken != "" {
		q.Set("next_token", in.NextToken)
	}
	var out wire.ListAnswer
	index, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/sessions", query: q}, &out)
	return out, index, err
}

// Renew extends the chat's session to ttl from now, or to the server's default TTL from
// now if ttl is 0.
func (c *Client) Renew(ctx context.Context, chatID uuid.UUID, ttl time.Duration) (wire.Session, error) {
	var out wire.SessionAnswer
	_, err := c.call(ctx, request{
		method: http.MethodPost,
		path:   sessionPath(chatID) + "/renew",
		body:   wire.RenewRequest{TTL: duration(ttl)},
	}, &out)
	return out.Session, err
}

// Delete ends the chat's session, and returns once nothing of it is left.
func (c *Client) Delete(ctx context.Context, chatID uuid.UUID) (wire.DeleteAnswer, error) {
	var out wire.DeleteAnswer
	_, err := c.call(ctx, request{method: http.MethodDelete, path: sessionPath(chatID)}, &out)
	return out, err
}

// Cleanup ends the sessions that have expired.
func (c *Client) Cleanup(ctx context.Context) (wire.CleanupAnswer, error) {
	var out wire.CleanupAnswer
	_, err := c.call(ctx, request{method: http.MethodPost, path: "/v1/cleanup"}, &out)
	return out, err
}

// Pools returns all pools of spares, by name.
func (c *Client) Pools(ctx context.Context) (wire.PoolsAnswer, error) {
	var out wire.PoolsAnswer
	_, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/pools"}, &out)
	return out, err
}

// Adopt restores the identity of a store that lost it, and writes the records of the
// running sandboxes again. instance is required if the server started after the loss.
func (c *Client) Adopt(ctx context.Context, instance string) (wire.AdoptAnswer, error) {
	var out wire.AdoptAnswer
	_, err := c.call(ctx, request{
		method: http.MethodPost, path: "/v1/operator/adopt", body: wire.AdoptRequest{Instance: instance},
	}, &out)
	return out, err
}

// Forget writes a fresh identity to a store that has none.
func (c *Client) Forget(ctx context.Context) (wire.ForgetAnswer, error) {
	var out wire.ForgetAnswer
	_, err := c.call(ctx, request{method: http.MethodPost, path: "/v1/operator/forget"}, &out)
	return out, err
}

// Repair repairs the chat's record.
func (c *Client) Repair(ctx context.Context, chatID uuid.UUID) (wire.RepairAnswer, error) {
	var out wire.RepairAnswer
	_, err := c.call(ctx, request{method: http.MethodPost, path: "/v1/operator/repair/" + chatID.String()}, &out)
	return out, err
}

// Health returns the health of the server. If a part is failing, it returns an answer and
// also an *Error with code wire.CodeUnhealthy.
func (c *Client) Health(ctx context.Context) (wire.HealthAnswer, error) {
	var out wire.HealthAnswer
	_, err := c.call(ctx, request{method: http.MethodGet, path: "/v1/agent/health"}, &out)
	if e, ok := errors.AsType[*Error](err); ok && e.Code == wire.CodeUnhealthy {
		if err := json.Unmarshal(e.body, &out); err != nil {
			return out, unexpected(err)
		}
	}
	return out, err
}

func sessionPath(chatID uuid.UUID) string { return "/v1/sessions/" + chatID.String() }

// duration returns "" if d is 0, so that the field is left out.
func duration(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}

type request struct {
	method string
	path   string
	query  url.Values
	header http.Header
	body   any // nil: none
}

// call sends one request and decodes a successful response into out. It returns the
// response's index, or 0 if it has none.
func (c *Client) call(ctx context.Context, in request, out any) (uint64, error) {
	res, err := c.send(ctx, in)
	index := indexOf(res)
	if err != nil {
		return index, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return 0, unanswered(ctx, fmt.Errorf("read the server's answer: %w", err))
	}
	if err := json.Unmarshal(text, out); err != nil {
		return 0, unexpected(err)
	}
	return index, nil
}

// indexOf returns the index in a response's header, or 0 if there is none.
func indexOf(res *http.Response) uint64 {
	if res == nil {
		return 0
	}
	index, _ := strconv.ParseUint(res.Header.Get(wire.HeaderIndex), 10, 64)
	return index
}

// send sends one request and returns its response if that is a success. The caller closes
// its body. With an *Error it also returns the response, whose body is closed.
func (c *Client) send(ctx context.Context, in request) (*http.Response, error) {
	u := *c.base
	u.Path, u.RawQuery = in.path, in.query.Encode()
	var body io.Reader
	if in.body != nil {
		text, err := json.Marshal(in.body)
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, in.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if in.header != nil {
		req.Header = in.header
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set(wire.HeaderToken, c.token)
	}

	res, err := c.http.Do(req)
	if err != nil {
		return nil, unanswered(ctx, err) // err contains the method and the URL
	}
	if res.StatusCode == http.StatusOK || res.StatusCode == http.StatusCreated {
		return res, nil
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, unanswered(ctx, fmt.Errorf("read the server's answer: %w", err))
	}
	return res, errorOf(res, text)
}

// unanswered adds ErrUnreachable to the error of a request without a response, unless the
// caller's context ended.
func unanswered(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

func unexpected(err error) error {
	return fmt.Errorf("the server's answer is not as expected: %w", err)
}
