package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/semaphore"

	"github.com/bivouac/bivouac/internal/agent/httpserver"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

const (
	// maxOrders is how many orders are carried out at a time. Others wait.
	maxOrders = 16
	// maxConnections is how many connections are open at a time.
	maxConnections = 256
	// orderLimit is how long an order may take, with its wait. A system call that hangs,
	// for example on a lost file server, keeps one of the maxOrders places until it ends.
	orderLimit = 10 * time.Second
)

// sandboxes carries out orders. Its errors wrap those of package runtime.
type sandboxes interface {
	bind(ctx context.Context, order nodeapi.Order) error
	look(ctx context.Context, order nodeapi.Order) error
	// bound returns what was bound. While that is as in the known version, it waits until
	// ctx ends.
	bound(ctx context.Context, known string) (nodeapi.Bound, error)
}

// server answers requests.
type server struct {
	stopping   context.Context //nolint:containedctx // ends when the server stops, and with it the wait for changes
	clientName string
	places     *semaphore.Weighted
	log        hclog.Logger
}

// newServer returns the handler of a server that stops when ctx ends.
func newServer(ctx context.Context, all sandboxes, clientName string, log hclog.Logger) http.Handler {
	s := &server{stopping: ctx, clientName: clientName, places: semaphore.NewWeighted(maxOrders), log: log}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+nodeapi.PathBind, s.order("bind", nodeapi.Order.ValidateBind, all.bind))
	mux.HandleFunc("POST "+nodeapi.PathLook, s.order("look", nodeapi.Order.ValidateLook, all.look))
	mux.HandleFunc("GET "+nodeapi.PathBound, s.bound(all.bound))
	mux.HandleFunc("GET "+nodeapi.PathLive, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	return mux
}

// order returns a handler for an order of a kind. It logs each order with its outcome.
func (s *server) order(kind string, validate func(nodeapi.Order) error, carryOut func(context.Context, nodeapi.Order) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		ctx, cancel := context.WithTimeout(r.Context(), orderLimit)
		defer cancel()
		log := s.log.With("order", kind, "remote_addr", r.RemoteAddr)
		var order nodeapi.Order
		status, err := s.allowed(r)
		if err == nil {
			httpserver.Keep(r.Context())
			status, err = s.read(w, r, &order)
		}
		if err == nil {
			log = log.With("session_id", order.SessionID, "chat_id", order.ChatID, "alloc_id", order.AllocID,
				"task", order.Task, "task_driver", order.TaskDriver, "volume_host_path", order.VolumeHostPath)
			if err = validate(order); err != nil {
				status = http.StatusBadRequest
			}
		}
		if err == nil {
			err = s.carryOut(ctx, order, carryOut)
			status = statusOf(err)
		}
		log = log.With("took", time.Since(started).String())
		if err != nil {
			log.Warn("order_refused", "status", status, "error", err)
			answer(w, status, nodeapi.Error{Message: err.Error()})
			return
		}
		log.Info("order_done")
		w.WriteHeader(http.StatusNoContent)
	}
}

// bound returns a handler that tells what was bound.
func (s *server) bound(wait func(ctx context.Context, known string) (nodeapi.Bound, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var all nodeapi.Bound
		status, err := s.allowed(r)
		if err == nil {
			httpserver.Keep(r.Context())
			ctx, cancel := context.WithTimeout(r.Context(), nodeapi.BoundWait)
			defer cancel()
			defer context.AfterFunc(s.stopping, cancel)()
			if all, err = wait(ctx, r.URL.Query().Get("known")); err != nil {
				status = statusOf(err)
			}
		}
		if err != nil {
			s.log.Warn("bound_refused", "remote_addr", r.RemoteAddr, "status", status, "error", err)
			answer(w, status, nodeapi.Error{Message: err.Error()})
			return
		}
		answer(w, http.StatusOK, all)
	}
}

func answer(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(value) // the caller has gone
}

// allowed checks the client's certificate. That it comes from the right CA was checked at
// the handshake. The name is checked because the same CA may have issued the certificates
// of other programs, such as the helpers of other nodes.
func (s *server) allowed(r *http.Request) (status int, err error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return http.StatusUnauthorized, errors.New("a client certificate is required")
	}
	if err := r.TLS.PeerCertificates[0].VerifyHostname(s.clientName); err != nil {
		return http.StatusForbidden, fmt.Errorf("the client certificate is not that of a Bivouac server: %w", err)
	}
	return 0, nil
}

func (s *server) read(w http.ResponseWriter, r *http.Request, order *nodeapi.Order) (status int, err error) {
	// The limit of an order's time starts with its headers.
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(orderLimit)); err != nil {
		return http.StatusInternalServerError, fmt.Errorf("limit the time to read the order: %w", err)
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, nodeapi.MaxBody))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(order); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return http.StatusRequestEntityTooLarge, fmt.Errorf("the order is over %d bytes", nodeapi.MaxBody)
		}
		return http.StatusBadRequest, fmt.Errorf("the order is not valid JSON: %w", err)
	}
	return 0, nil
}

// carryOut waits for a place and carries the order out. If ctx ends first, it returns at
// once, and the order keeps its place until it is done.
func (s *server) carryOut(ctx context.Context, order nodeapi.Order, f func(context.Context, nodeapi.Order) error) error {
	if err := s.places.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("%w: %d orders are being carried out", runtime.ErrUnavailable, maxOrders)
	}
	done := make(chan error, 1)
	go func() {
		defer s.places.Release(1)
		done <- f(ctx, order)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: the order takes too long: %w", runtime.ErrUnavailable, ctx.Err())
	}
}

// statusOf returns the status that says what an error means.
func statusOf(err error) int {
	switch {
	case err == nil:
		return http.StatusNoContent
	case errors.Is(err, runtime.ErrConflict):
		return http.StatusConflict
	case errors.Is(err, runtime.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, runtime.ErrInvalid):
		return http.StatusBadRequest
	default:
		return http.StatusServiceUnavailable
	}
}
