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
)

// OpenAPI describes the API, in OpenAPI 3.1.
//
//go:embed openapi.json
var OpenAPI []byte

// Check asks one part that the agent needs whether it is there.
type Check struct {
	Name     string
	Run      func(ctx context.Context) error // returns as soon as ctx ends
	Optional bool                            // it is told where it fails, and the agent can serve all the same
}

// checkLimit is how long a health check may take.
const checkLimit = 2 * time.Second

// checkupLasts is how long callers are told what the last checks found.
const checkupLasts = time.Second

// checkup is what the checks found last. Callers that come together share one
// run, so that they take no requests to Consul and Nomad from others.
type checkup struct {
	turn chan struct{} // one token, for who reads or changes the rest
	at   time.Time     // zero: never
	errs []error       // in the order of the checks
}

// checkUp returns what the checks found within the last second. It takes no
// longer than checkLimit, and as long again if a run has to be waited for.
func (a *API) checkUp(ctx context.Context) []error {
	a.checkup.turn <- struct{}{}
	defer func() { <-a.checkup.turn }()
	if !a.checkup.at.IsZero() && time.Since(a.checkup.at) < checkupLasts {
		return a.checkup.errs
	}
	// Not the caller's: others are told the same.
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

// run keeps a panic from ending the process: it would be in a goroutine that
// net/http does not watch.
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
