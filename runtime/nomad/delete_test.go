package nomad_test

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

// statusWriter notes the status of an answer before it is sent.
type statusWriter struct {
	http.ResponseWriter
	note func(status int)
}

func (w statusWriter) WriteHeader(status int) {
	w.note(status)
	w.ResponseWriter.WriteHeader(status)
}

func isCollect(r *http.Request) bool {
	return r.Method == http.MethodPut && strings.HasPrefix(r.URL.Path, "/v1/client/allocation/") && strings.HasSuffix(r.URL.Path, "/gc")
}

// TestDelete_believes_the_client_that_removed_the_allocation checks that nothing of the
// sandbox runs when the Nomad client says that it has removed the allocation. On a slow
// machine the client may have reported the start before, and is not asked.
func TestDelete_believes_the_client_that_removed_the_allocation(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	r := openThrough(t, p, rawExec(t, nil))
	spec, sandbox := create(t, r)
	must.True(t, answers(sandbox.Endpoint))
	var mu sync.Mutex
	served, collected := false, false
	p.setFault(func(w http.ResponseWriter, req *http.Request, server http.Handler) bool {
		if !isCollect(req) {
			return false
		}
		server.ServeHTTP(statusWriter{w, func(status int) {
			mu.Lock()
			defer mu.Unlock()
			if status == http.StatusOK {
				collected, served = true, answers(sandbox.Endpoint)
			}
		}}, req)
		return true
	})
	must.NoError(t, r.Delete(patiently(t), spec.SessionID))
	must.False(t, answers(sandbox.Endpoint))
	mu.Lock()
	defer mu.Unlock()
	must.False(t, served)
	t.Logf("the client removed it before it reported: %t", collected)
}

// TestDelete_waits_for_the_report_if_the_client_does_not_tell covers a token that lacks
// the right, and a client that cannot be reached.
func TestDelete_waits_for_the_report_if_the_client_does_not_tell(t *testing.T) {
	t.Parallel()
	for name, status := range map[string]int{"denied": http.StatusForbidden, "no path to the client": http.StatusNotFound, "an error": http.StatusInternalServerError} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t)
			r := openThrough(t, p, rawExec(t, nil))
			spec, sandbox := create(t, r)
			p.setFault(func(w http.ResponseWriter, req *http.Request, _ http.Handler) bool {
				if !isCollect(req) {
					return false
				}
				http.Error(w, name, status)
				return true
			})
			must.NoError(t, r.Delete(patiently(t), spec.SessionID))
			must.False(t, answers(sandbox.Endpoint))
			_, err := r.Inspect(patiently(t), spec.SessionID)
			must.ErrorIs(t, err, runtime.ErrNotFound)
		})
	}
}
