package api_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

func TestListFilters(t *testing.T) {
	f := &fake{}
	a := start(t, f)
	given := session
	given.State, given.Reason = scheduler.StateDead, "Exit code 137"
	given.Labels = map[string]string{"ticket": "Ä-4711"}

	for query, want := range map[string]bool{
		"state=dead":                            true,
		"state=running":                         false,
		"text=ARCHE":                            true, // the agent
		"text=2A54-5b0e":                        true, // the chat
		"text=code+137":                         true,
		"text=ticket%3D" + url.QueryEscape("ä"): true,
		"text=4711":                             true,
		"text=srv":                              false, // the volume
		"text=0f0c3c1a":                         false, // the session's ID
		"state=dead&text=researcher":            true,
		"state=lost&text=researcher":            false,
	} {
		res, _ := a.send(request{method: "GET", path: "/v1/sessions?" + query})
		must.Eq(t, 200, res.StatusCode)
		must.Eq(t, want, f.query.Include(given), must.Sprint(query))
	}
	t.Run("without one the store is not asked to select", func(t *testing.T) {
		a.send(list)
		must.Nil(t, f.query.Include)
	})
	t.Run("has bounds", func(t *testing.T) {
		for query, says := range map[string]string{
			"state=Dead":                        "state is none of creating, running, stopping, dead, lost",
			"text=" + strings.Repeat("x", 257):  "text is over 256 bytes",
			"state=dead&index=1&wait=1s":        "index cannot be combined",
			"state=dead&per_page=10&text=a&x=1": "unknown query parameter",
		} {
			status, refusal := a.refused(request{method: "GET", path: "/v1/sessions?" + query})
			must.Eq(t, 400, status)
			must.StrContains(t, refusal.Message, says)
		}
	})
}

// slowList is a fake whose lists take until release is closed.
type slowList struct {
	fake
	inside, release chan struct{}
}

func (s *slowList) List(ctx context.Context, query scheduler.Query) (scheduler.Page, error) {
	if query.Include != nil {
		s.inside <- struct{}{}
		<-s.release
	}
	return s.fake.List(ctx, query)
}

func TestFilteredListsAreBounded(t *testing.T) {
	s := &slowList{inside: make(chan struct{}), release: make(chan struct{})}
	a := start(t, s)
	filtered := request{method: "GET", path: "/v1/sessions?text=a"}
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			if res, _ := a.send(filtered); res.StatusCode != http.StatusOK {
				t.Errorf("a filtered list is answered with %d", res.StatusCode)
			}
		})
	}
	for range 8 {
		<-s.inside
	}
	status, refusal := a.refused(filtered)
	must.Eq(t, 429, status)
	must.Eq(t, wire.CodeBusy, refusal.Code)
	res, _ := a.send(list) // which reads one page
	must.Eq(t, 200, res.StatusCode)
	close(s.release)
	callers.Wait()
}

func TestGet_says_what_the_caller_may_do(t *testing.T) {
	a := start(t, &fake{}, authenticates)
	for caller, want := range map[string][]string{
		"reader": {"read"},
		"nobody": {}, // the fake shows the session to all
	} {
		r := get
		r.header = http.Header{wire.HeaderToken: {caller}}
		_, body := a.send(r)
		var answer wire.GetAnswer
		must.NoError(t, json.Unmarshal([]byte(body), &answer))
		must.Eq(t, want, answer.Capabilities)
	}
	_, body := start(t, &fake{}).send(get)
	must.StrContains(t, body, `"capabilities":["read","write","logs","exec"]`, must.Sprint("without authentication"))
}

func TestUI(t *testing.T) {
	page := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte("page of " + r.URL.Path)) })
	a := start(t, &fake{}, authenticates, func(c *api.Config) { c.UI, c.ClientCertificates = page, true })
	fetch := func(path, host string) (int, string) {
		t.Helper()
		req := a.newRequest(t.Context(), request{method: "GET", path: path, host: host})
		res, err := http.DefaultTransport.RoundTrip(req)
		must.NoError(t, err)
		body, err := io.ReadAll(res.Body)
		must.NoError(t, err)
		must.NoError(t, res.Body.Close())
		return res.StatusCode, string(body)
	}
	t.Run("is open", func(t *testing.T) {
		for _, path := range []string{"/ui/", "/ui/app.js"} {
			status, body := fetch(path, "")
			must.Eq(t, 200, status)
			must.Eq(t, "page of "+path, body)
		}
	})
	t.Run("is one folder", func(t *testing.T) {
		status, _ := fetch("/ui", "")
		must.Eq(t, http.StatusTemporaryRedirect, status)
		status, _ = fetch("/ui/../v1/sessions", "")
		must.Eq(t, 404, status)
	})
	t.Run("is not for a foreign host", func(t *testing.T) {
		status, body := fetch("/ui/", "evil.example")
		must.Eq(t, 403, status)
		must.StrContains(t, body, "forbidden_host")
	})
	t.Run("can be absent", func(t *testing.T) {
		status, refusal := start(t, &fake{}).refused(request{method: "GET", path: "/ui/"})
		must.Eq(t, 404, status)
		must.Eq(t, wire.CodeUnknownPath, refusal.Code)
	})
}
