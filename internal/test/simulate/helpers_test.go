package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/simulate/nomadmodel"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// helperService is the name of the service of the node helpers in Nomad.
const helperService = "bivouac-node"

// helpers are models of the node helpers. A helper binds the volume of one order to each
// run of a sandbox, and refuses all other orders.
type helpers struct {
	w *world

	mu      sync.Mutex
	bound   map[string]nodeapi.Order // by allocation and run
	changed broadcast.Cond           // bound
	down    map[int]int              // while it is not 0, the helper of that node refuses connections
	hung    map[int]chan struct{}    // the helper of that node answers once this is closed
	asked   map[int]int              // orders to the helper of that node
	failed  map[string]time.Duration // when the helper of that node last failed or was about to, by the node's ID
}

func newHelpers(w *world) *helpers {
	h := &helpers{
		w: w, bound: make(map[string]nodeapi.Order), down: make(map[int]int),
		hung: make(map[int]chan struct{}), asked: make(map[int]int), failed: make(map[string]time.Duration),
	}
	h.changed.L = &h.mu
	return h
}

// fail makes the helper of a node refuse connections or hang for a time, and reports
// whether it was asked meanwhile. A helper that hung carries out its orders afterwards.
func (h *helpers) fail(node int, lasts time.Duration, hang bool) bool {
	id := h.w.nomad.NodeID(node)
	h.mu.Lock()
	h.failed[id] = max(h.failed[id], h.w.now()+lasts)
	before := h.asked[node]
	release := make(chan struct{})
	switch {
	case !hang:
		h.down[node]++
	case h.hung[node] == nil:
		h.hung[node] = release
	}
	h.mu.Unlock()
	h.w.loseTrack()
	wait(h.w.ctx, lasts)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !hang:
		h.down[node]--
	case h.hung[node] == release:
		close(release)
		h.hung[node] = nil
	}
	return h.asked[node] > before
}

// hasFailed reports whether the helper of a node has failed lately.
func (h *helpers) hasFailed(nodeID string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	at, ok := h.failed[nodeID]
	return ok && h.w.now() < at+h.w.hearingLimit()
}

// Serve implements [network.Server]. The port of the request says whose helper is asked.
func (h *helpers) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	port, err := strconv.Atoi(req.URL.Port())
	if err != nil {
		panic(err)
	}
	node := port - nomadmodel.ServicePort
	h.mu.Lock()
	if req.URL.Path != "/bound" { // replicas ask that all the time
		h.asked[node]++
	}
	down, hung := h.down[node] > 0, h.hung[node]
	h.mu.Unlock()
	if down {
		return network.Text(http.StatusBadGateway, "connection refused")
	}
	if hung != nil {
		select {
		case <-hung:
			wait(h.w.ctx, network.Latency(h.w.net.Rand("helper goes on")))
		case <-h.w.ctx.Done():
		}
	}
	if req.URL.Path == "/bound" {
		text, err := json.Marshal(h.allBound(ctx, node, req.URL.Query().Get("known")))
		if err != nil {
			panic(err)
		}
		return network.Answer(http.StatusOK, text)
	}
	var order nodeapi.Order
	if err := json.Unmarshal(body, &order); err != nil {
		panic(err)
	}
	status := http.StatusNotFound
	h.w.nomad.Inside(order.AllocID, func(p nomadmodel.Process) {
		if p.NodeID == h.w.nomad.NodeID(node) && p.Meta[jobs.MetaSessionID] == order.SessionID {
			status = http.StatusOK
			if req.URL.Path == "/bind" {
				status = h.bind(p, order)
			}
		}
	})
	return network.Text(status, http.StatusText(status))
}

// bind carries out an order. Nomad's model is locked.
func (h *helpers) bind(p nomadmodel.Process, order nodeapi.Order) int {
	h.w.noteOrder(order)
	h.mu.Lock()
	defer h.mu.Unlock()
	key := fmt.Sprint(p.AllocID, " ", p.Run)
	switch before, ok := h.bound[key]; {
	case ok && before != order:
		return http.StatusConflict
	case !ok:
		h.bound[key] = order
		h.changed.Broadcast()
		h.w.noteBound(p, order.ChatID)
	}
	return http.StatusOK
}

// allBound returns what the helper of a node has bound. If that is known, it waits for a
// change. Any bind on another node counts as one.
func (h *helpers) allBound(ctx context.Context, node int, known string) nodeapi.Bound {
	ctx, cancel := context.WithTimeout(ctx, nodeapi.BoundWait)
	defer cancel()
	var bound nodeapi.Bound
	err := h.changed.Wait(ctx, func() bool {
		bound.Version = strconv.Itoa(len(h.bound))
		return bound.Version != known
	})
	if err != nil {
		return bound
	}
	processes := h.w.processes() // locks Nomad's model, which bind has locked before h.mu
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range processes {
		if order, ok := h.bound[fmt.Sprint(p.AllocID, " ", p.Run)]; ok && p.NodeID == h.w.nomad.NodeID(node) {
			bound.Orders = append(bound.Orders, order)
		}
	}
	return bound
}

// helperClient is a replica's way to the helpers.
type helperClient struct{ http *http.Client }

// Look implements the interface Helper of package nomad.
func (c helperClient) Look(ctx context.Context, address string, order nodeapi.Order) error {
	return c.send(ctx, address, "/look", order)
}

// Bind implements the interface Helper of package nomad.
func (c helperClient) Bind(ctx context.Context, address string, order nodeapi.Order) error {
	return c.send(ctx, address, "/bind", order)
}

// Bound implements the interface Helper of package nomad.
func (c helperClient) Bound(ctx context.Context, address, known string) (nodeapi.Bound, error) {
	var bound nodeapi.Bound
	text, err := c.do(ctx, http.MethodGet, address, "/bound?known="+known, nil)
	if err == nil {
		err = json.Unmarshal(text, &bound)
	}
	return bound, err
}

func (c helperClient) send(ctx context.Context, address, path string, order nodeapi.Order) error {
	body, err := json.Marshal(order)
	if err != nil {
		return err
	}
	_, err = c.do(ctx, http.MethodPost, address, path, body)
	return err
}

func (c helperClient) do(ctx context.Context, method, address, target string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+address+target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	case resp.StatusCode == http.StatusOK:
		return text, nil
	case resp.StatusCode == http.StatusConflict:
		return nil, fmt.Errorf("%w: %s", runtime.ErrConflict, text)
	case resp.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%w: %s", runtime.ErrNotFound, text)
	default:
		return nil, fmt.Errorf("%w: %s", runtime.ErrUnavailable, text)
	}
}
