package api

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/bivouac/bivouac/scheduler"
)

// kind is how an endpoint answers.
type kind int

const (
	// unary is one answer, written as a whole.
	unary kind = iota
	// stream is an answer in parts, each of which is sent when it is written. It
	// ends when the API stops.
	stream
	// upgrade hands the connection over to another protocol, with
	// http.ResponseController.Hijack. Its context ends when the API stops.
	upgrade
)

// endpoint is what one method of one path does.
type endpoint struct {
	kind   kind
	places places // one is taken while the endpoint runs
	// handle returns an error to have it answered. After the first byte of the
	// answer it is too late for that: then the connection is closed, so that the
	// caller does not take the answer for complete.
	handle func(w http.ResponseWriter, r *http.Request, q query) error
	params []string // the query parameters that it knows
}

// methods are the endpoints of one path. HEAD is GET without the body, which
// net/http leaves out by itself.
type methods map[string]endpoint

// handle serves the methods of a path.
func (a *API) handle(path string, m methods) {
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
	leave, err := e.places.enter()
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
	if ans, ok := w.(*answer); ok {
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

// places bounds how many requests of a kind run at a time. The zero value has
// room for any number.
type places struct {
	what   string
	tokens chan struct{}
}

func newPlaces(what string, n int) places { return places{what, make(chan struct{}, n)} }

// enter takes a place until leave is called. It returns an error that wraps
// [scheduler.ErrBusy] if all are taken.
func (p places) enter() (leave func(), err error) {
	if p.tokens == nil {
		return func() {}, nil
	}
	select {
	case p.tokens <- struct{}{}:
		return func() { <-p.tokens }, nil
	default:
		return nil, fmt.Errorf("%w: %d %s already", scheduler.ErrBusy, cap(p.tokens), p.what)
	}
}
