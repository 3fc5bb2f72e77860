// Package apiclient calls the Control API. Each method is one request: nothing
// is retried, and nothing is cached.
//
// It must never know what stands behind the API, nor how its answers are shown.
package apiclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

// maxAnswer bounds what is read of an answer: a full page of the longest
// sessions, every byte of them escaped, and room to spare.
const maxAnswer = 64 << 20

// Client calls the API of one agent. It is safe for concurrent use.
type Client struct {
	base *url.URL
	http *http.Client
}

// New returns a client of the agent at an address such as "127.0.0.1:4747" or
// "http://localhost:4747". A nil transport is http.DefaultTransport. There is
// no time limit but that of each call's context: a create and a blocking read
// may take minutes.
func New(address string, transport http.RoundTripper) (*Client, error) {
	full := address
	if !strings.Contains(full, "://") {
		full = "http://" + full
	}
	base, err := url.Parse(full)
	if err != nil {
		return nil, fmt.Errorf("address of the agent: %w", err)
	}
	if (base.Scheme != "http" && base.Scheme != "https") || base.Host == "" || strings.Trim(base.Path, "/") != "" ||
		base.RawQuery != "" || base.Fragment != "" || base.User != nil {
		return nil, fmt.Errorf("address of the agent: %q is not of the form http://HOST:PORT", address)
	}
	return &Client{
		base: &url.URL{Scheme: base.Scheme, Host: base.Host},
		http: &http.Client{
			Transport: transport,
			// The API redirects nothing, so whoever does is not it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// CreateInput is what a chat's sandbox is made from.
type CreateInput struct {
	AgentID        string
	VolumeHostPath string
	Runtime        string            // empty: whatever stands, or else the agent's default
	TTL            time.Duration     // 0: the agent's default
	Labels         map[string]string // nil: none, and whatever the session that stands has
	// Progress is told each stage of a start as it is reached, one call at a
	// time and none after Create returned. It may be nil.
	Progress func(runtime.Stage)
}

// Create gives the chat its sandbox and returns once it is ready.
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

// Block asks a read to wait for a change.
type Block struct {
	Index uint64        // what the read before returned; 0: do not wait
	Wait  time.Duration // at most 10 minutes; 0: the agent's default, 5 minutes
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

// Get returns the chat's session, and the index for a next, blocking Get. Where
// the chat has none, the *Error's code is wire.CodeNotFound, and there is an
// index as well.
func (c *Client) Get(ctx context.Context, chatID uuid.UUID, block Block) (wire.Session, uint64, error) {
	var out wire.SessionAnswer
	index, err := c.call(ctx, request{method: http.MethodGet, path: sessionPath(chatID), query: block.query()}, &out)
	return out.Session, index, err
}

// MaxPerPage is how many sessions one page may hold.
const MaxPerPage = 1000

// ListInput selects a page of sessions.
type ListInput struct {
	AgentID   string // empty: all agents
	PerPage   int    // at most MaxPerPage; 0: the agent's default, 100
	NextToken string // of the page before; empty: the first page
	Block     Block
}

// List returns a page of sessions, and the index for a next, blocking List.
func (c *Client) List(ctx context.Context, in ListInput) (wire.ListAnswer, uint64, error) {
	q := in.Block.query()
	if in.AgentID != "" {
		q.Set("agent_id", in.AgentID)
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

// Renew extends the chat's session to ttl from now, or to the agent's default
// TTL where ttl is 0.
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

// Adopt gives a store without an identity the one that its sandboxes bear, of
// several the one that instance names, and makes records of them.
func (c *Client) Adopt(ctx context.Context, instance string) (wire.AdoptAnswer, error) {
	var out wire.AdoptAnswer
	_, err := c.call(ctx, request{
		method: http.MethodPost, path: "/v1/operator/adopt", body: wire.AdoptRequest{Instance: instance},
	}, &out)
	return out, err
}

// Forget gives a store without an identity a fresh one.
func (c *Client) Forget(ctx context.Context) (wire.ForgetAnswer, error) {
	var out wire.ForgetAnswer
	_, err := c.call(ctx, request{method: http.MethodPost, path: "/v1/operator/forget"}, &out)
	return out, err
}

// Repair mends the chat's record, and returns what that came to.
func (c *Client) Repair(ctx context.Context, chatID uuid.UUID) (wire.RepairAnswer, error) {
	var out wire.RepairAnswer
	_, err := c.call(ctx, request{method: http.MethodPost, path: "/v1/operator/repair/" + chatID.String()}, &out)
	return out, err
}

// Health says how the agent stands. Where a part is failing there are both an
// answer and an *Error with wire.CodeUnhealthy.
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

// duration leaves the field out where d is 0.
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

// call sends one request and decodes the answer into out, unless it is an
// error. It returns the answer's index, 0 where it has none.
func (c *Client) call(ctx context.Context, in request, out any) (uint64, error) {
	u := *c.base
	u.Path, u.RawQuery = in.path, in.query.Encode()
	var body io.Reader
	if in.body != nil {
		text, err := json.Marshal(in.body)
		if err != nil {
			return 0, fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, in.method, u.String(), body)
	if err != nil {
		return 0, err
	}
	if in.header != nil {
		req.Header = in.header
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}

	res, err := c.http.Do(req)
	if err != nil {
		return 0, unanswered(ctx, err) // names the method and the URL
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return 0, unanswered(ctx, fmt.Errorf("read the agent's answer: %w", err))
	}
	index, _ := strconv.ParseUint(res.Header.Get(wire.HeaderIndex), 10, 64) // 0 where there is none
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusCreated {
		return index, errorOf(res, text)
	}
	if err := json.Unmarshal(text, out); err != nil {
		return 0, unexpected(err)
	}
	return index, nil
}

// unanswered adds ErrUnreachable to the error of a request that got no answer,
// unless the caller gave it up.
func unanswered(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

func unexpected(err error) error { return fmt.Errorf("the agent's answer is not as expected: %w", err) }
