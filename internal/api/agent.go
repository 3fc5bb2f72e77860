package api

import (
	"context"
	_ "embed" // for openapi.json
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

// OpenAPI describes the API, in OpenAPI 3.1.
//
//go:embed openapi.json
var OpenAPI []byte

// Check checks something that the server needs.
type Check struct {
	Name     string
	Run      func(ctx context.Context) error // returns as soon as ctx ends
	Optional bool                            // a failure is reported, but the server is still healthy
}

// checkLimit is how long a health check may take.
const checkLimit = 2 * time.Second

// checkupLasts is how long the results of the checks are reused.
const checkupLasts = time.Second

// checkup holds the last results of the checks. Callers that come at the same time
// share one run, so that health checks do not displace other requests to Consul and
// Nomad.
type checkup struct {
	turn chan struct{} // one token; its holder may use the other fields
	at   time.Time     // zero: never
	errs []error       // in the order of the checks
}

// checkUp returns results of the checks that are at most one second old. It takes at
// most checkLimit, or twice that if it has to wait for another run.
func (a *API) checkUp(ctx context.Context) []error {
	a.checkup.turn <- struct{}{}
	defer func() { <-a.checkup.turn }()
	if !a.checkup.at.IsZero() && time.Since(a.checkup.at) < checkupLasts {
		return a.checkup.errs
	}
	// Not the caller's context: other callers share the results.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkLimit)
	defer cancel()
	errs := make([]error, len(a.config.Checks))
	var running sync.WaitGroup
	for i, check := range a.config.Checks {
		running.Go(func() { errs[i] = run(ctx, check) })
	}
	running.Wait()
	a.checkup.at, a.checkup.errs = time.Now(), errs
	return errs
}

// live reports that the process answers. It checks nothing: to restart a server does not
// help if Consul or Nomad cannot be reached.
func (*API) live(w http.ResponseWriter, _ *http.Request, _ query) error {
	return writeJSON(w, http.StatusOK, wire.LiveAnswer{Status: wire.StatusOK})
}

func (a *API) health(w http.ResponseWriter, r *http.Request, _ query) error {
	errs := a.checkUp(r.Context())
	body := wire.HealthAnswer{Status: wire.StatusOK, Instance: a.config.Instance(), Checks: make(map[string]wire.Check, len(a.config.Checks))}
	var failing []string
	for i, check := range a.config.Checks {
		if errs[i] == nil {
			body.Checks[check.Name] = wire.Check{Status: wire.StatusOK}
			continue
		}
		body.Checks[check.Name] = wire.Check{Status: wire.StatusFailing, Error: errs[i].Error()}
		if !check.Optional {
			failing = append(failing, check.Name)
		}
	}
	if scheduler.CallerFrom(r.Context()).MayOperate(scheduler.LevelRead) != nil {
		body.Instance, body.Checks = "", nil // errors may name hosts and tokens
	}
	if failing == nil {
		return writeJSON(w, http.StatusOK, body)
	}
	body.Status = wire.StatusFailing
	body.Error = &wire.Error{
		Code:      wire.CodeUnhealthy,
		Message:   "failing: " + strings.Join(failing, ", "),
		RequestID: w.Header().Get(wire.HeaderRequestID),
	}
	return writeJSON(w, http.StatusServiceUnavailable, body)
}

// run runs a check and turns a panic into an error. The check has its own goroutine,
// where net/http does not recover a panic.
func run(ctx context.Context, check Check) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
		}
	}()
	return check.Run(ctx)
}

func (a *API) self(w http.ResponseWriter, r *http.Request, _ query) error {
	self := a.config.Self
	self.Instance = a.config.Instance()
	self.Runtimes = a.config.Runtimes(r.Context())
	self.Replicas = a.config.Replicas(r.Context())
	return writeJSON(w, http.StatusOK, self)
}

func (a *API) metrics(w http.ResponseWriter, r *http.Request, _ query) error {
	a.config.Metrics.ServeHTTP(w, r)
	return nil
}

func (*API) openAPI(w http.ResponseWriter, _ *http.Request, _ query) error {
	writeBytes(w, http.StatusOK, OpenAPI)
	return nil
}
