package api

import (
	"context"
	"errors"
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
	// context ends when the API stops or the caller's credential expires.
	stream
	// upgrade endpoints hand the connection over to another protocol with
	// http.ResponseController.Hijack. Their context ends like that of a stream;
	// context.Cause says why.
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
	leave, err := a.enter(e.places, scheduler.CallerFrom(r.Context()))
	if err != nil {
		return err
	}
	defer leave()
	q, err := parseQuery(r.URL.RawQuery, e.params)
	if err != nil {
		return err
	}
	if e.kind == unary {
		return e.handle(w, r, q)
	}
	ctx, cancel := a.whileServed(r.Context())
	defer cancel()
	if isAnswer {
		ans.flush = e.kind == stream
	}
	err = e.handle(w, r.WithContext(ctx), q)
	if e.kind == stream && errors.Is(context.Cause(ctx), errCredentialExpired) {
		return errCredentialExpired // a stream that merely ends would look complete
	}
	return err
}

// enter takes one of the places until the returned function is called. One caller gets only
// its share of those for requests that may wait long. Without authentication nobody can be
// told from another, so there are no shares.
func (a *API) enter(places scheduler.Places, caller scheduler.Caller) (func(), error) {
	if places != a.waiting || caller.Method == "" {
		return places.Enter()
	}
	return scheduler.EnterAll(places.Enter, a.waiters.Of(caller.Key()))
}

// whileServed returns a context that also ends when the API stops or the caller's
// credential expires. Its cause is then errShuttingDown or errCredentialExpired.
func (a *API) whileServed(ctx context.Context) (context.Context, context.CancelFunc) {
	release := func() {}
	if expires := scheduler.CallerFrom(ctx).Expires; !expires.IsZero() {
		ctx, release = context.WithDeadlineCause(ctx, expires, errCredentialExpired)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(a.stopping, func() { cancel(errShuttingDown) })
	return ctx, func() {
		stop()
		cancel(nil)
		release()
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
