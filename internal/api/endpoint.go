package api

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/bivouac/bivouac/scheduler"
)

// kind is the way in which an endpoint answers.
type kind int

const (
	// unary endpoints send one answer as a whole.
	unary kind = iota
	// stream endpoints send an answer in parts, each as soon as it is written. Their
	// context ends when the API stops.
	stream
	// upgrade endpoints hand the connection over to another protocol with
	// http.ResponseController.Hijack. Their context ends when the API stops.
	upgrade
)

// endpoint handles one method of one path.
type endpoint struct {
	kind   kind
	access access
	places scheduler.Places // one is taken while the endpoint runs
	// handle returns an error to send it as the answer. If the answer has already
	// begun, the connection is closed instead, so that the caller does not take the
	// answer for complete.
	handle func(w http.ResponseWriter, r *http.Request, q query) error
	params []string // the query parameters that it accepts
}

// methods are the endpoints of one path, by method. HEAD uses the endpoint of GET;
// net/http leaves out the body.
type methods map[string]endpoint

// handle registers the methods of a path. A path is open if all its methods are.
func (a *API) handle(path string, m methods) {
	a.open[path] = true
	for _, e := range m {
		a.open[path] = a.open[path] && e.access == open
	}
	a.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		method := r.Method
		if method == http.MethodHead {
			method = http.MethodGet
		}
		e, ok := m[method]
		if !ok {
			w.Header().Set("Allow", m.allow())
			fail(w, errMethodNotAllowed)
			return
		}
		if err := a.run(e, w, r); err != nil {
			fail(w, err)
		}
	})
}

func (a *API) run(e endpoint, w http.ResponseWriter, r *http.Request) error {
	ans, isAnswer := w.(*answer)
	if isAnswer && a.config.Audit != nil && e.access.isAudited() {
		var err error
		if r, err = a.received(ans, r); err != nil {
			return err
		}
	}
	if err := e.access.allow(scheduler.CallerFrom(r.Context())); err != nil {
		return err
	}
	leave, err := e.places.Enter()
	if err != nil {
		return err
	}
	defer leave()
	q, err := parseQuery(r.URL.RawQuery, e.params)
	if err != nil {
		return err
	}
	if e.kind != unary {
		ctx, cancel := a.untilStopped(r.Context())
		defer cancel()
		r = r.WithContext(ctx)
	}
	if isAnswer {
		ans.flush = e.kind == stream
	}
	return e.handle(w, r, q)
}

// untilStopped returns a context that also ends when the API stops.
func (a *API) untilStopped(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(a.stopping, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

func (m methods) allow() string {
	names := slices.Collect(maps.Keys(m))
	if _, ok := m[http.MethodGet]; ok {
		names = append(names, http.MethodHead)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}
