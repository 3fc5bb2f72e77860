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

	mu    sync.Mutex
	bound map[string]nodeapi.Order // by allocation and run
	down  map[int]int              // while it is not 0, the helper of that node refuses connections
	hung  map[int]chan struct{}    // the helper of that node answers once this is closed
	asked map[int]int              // orders to the helper of that node
}

func newHelpers(w *world) *helpers {
	return &helpers{w: w, bound: make(map[string]nodeapi.Order), down: make(map[int]int), hung: make(map[int]chan struct{}), asked: make(map[int]int)}
}

// fail makes the helper of a node refuse connections or hang for a time, and reports
// whether it was asked meanwhile. A helper that hung carries out its orders afterwards.
func (h *helpers) fail(node int, lasts time.Duration, hang bool) bool {
	h.mu.Lock()
	before := h.asked[node]
	release := make(chan struct{})
	switch {
	case !hang:
		h.down[node]++
	case h.hung[node] == nil:
		h.hung[node] = release
	}
	h.mu.Unlock()
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

// Serve implements [network.Server]. The port of the request says whose helper is asked.
func (h *helpers) Serve(_ context.Context, req *http.Request, body []byte) *http.Response {
	port, err := strconv.Atoi(req.URL.Port())
	if err != nil {
		panic(err)
	}
	var order nodeapi.Order
	if err := json.Unmarshal(body, &order); err != nil {
		panic(err)
	}
	node := port - nomadmodel.ServicePort
	h.mu.Lock()
	h.asked[node]++
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
		h.w.noteBound(p, order.ChatID)
	}
	return http.StatusOK
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

func (c helperClient) send(ctx context.Context, address, path string, order nodeapi.Order) error {
	body, err := json.Marshal(order)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	case resp.StatusCode == http.StatusOK:
		return nil
	case resp.StatusCode == http.StatusConflict:
		return fmt.Errorf("%w: %s", runtime.ErrConflict, text)
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%w: %s", runtime.ErrNotFound, text)
	default:
		return fmt.Errorf("%w: %s", runtime.ErrUnavailable, text)
	}
}
