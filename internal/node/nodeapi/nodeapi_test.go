package nodeapi_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

func validOrder() nodeapi.Order {
	return nodeapi.Order{
		SessionID: "8a1f6c2e-0000-4000-8000-000000000001", ChatID: "8a1f6c2e-0000-4000-8000-000000000002", AgentID: "agent",
		VolumeHostPath: "/srv/chats/a", AllocID: "8a1f6c2e-0000-4000-8000-000000000003", Task: "sandbox",
		TaskDriver: nodeapi.Docker, Target: "/workspace",
	}
}

func TestOrder(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*nodeapi.Order)
		want   string // of the error of a bind; empty: none
	}{
		"valid":                       {func(*nodeapi.Order) {}, ""},
		"no session":                  {func(o *nodeapi.Order) { o.SessionID = "" }, "session ID"},
		"no chat":                     {func(o *nodeapi.Order) { o.ChatID = "" }, "chat ID"},
		"no agent":                    {func(o *nodeapi.Order) { o.AgentID = "" }, "agent ID"},
		"relative volume":             {func(o *nodeapi.Order) { o.VolumeHostPath = "a" }, "volume host path is not absolute"},
		"allocation with a path":      {func(o *nodeapi.Order) { o.AllocID = "../" + o.AllocID }, "allocation ID"},
		"no task":                     {func(o *nodeapi.Order) { o.Task = "" }, "task"},
		"task with a path":            {func(o *nodeapi.Order) { o.Task = "a/b" }, "task"},
		"other driver":                {func(o *nodeapi.Order) { o.TaskDriver = "java" }, `unknown task driver "java"`},
		"root as target":              {func(o *nodeapi.Order) { o.Target = "/" }, "target"},
		"long note":                   {func(o *nodeapi.Order) { o.Note = strings.Repeat("x", 64<<10+1) }, "note has 65537 bytes"},
		"note":                        {func(o *nodeapi.Order) { o.Note = strings.Repeat("x", 64<<10) }, ""},
		"target that is not clean":    {func(o *nodeapi.Order) { o.Target = "/a/../b" }, "target is not clean"},
		"target above the session":    {func(o *nodeapi.Order) { o.Target = "/run" }, "target"},
		"target of the session":       {func(o *nodeapi.Order) { o.Target = "/run/bivouac" }, "target"},
		"target below the session":    {func(o *nodeapi.Order) { o.Target = "/run/bivouac/a" }, "target"},
		"target beside the session":   {func(o *nodeapi.Order) { o.Target = "/run/bivouac2" }, ""},
		"raw_exec outside its folder": {func(o *nodeapi.Order) { o.TaskDriver = nodeapi.RawExec }, "must be /run/bivouac/sandboxes/8a1f6c2e-"},
		"raw_exec": {func(o *nodeapi.Order) {
			o.TaskDriver, o.Target = nodeapi.RawExec, nodeapi.SandboxesDir+"/"+o.SessionID+"/workspace"
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			order := validOrder()
			c.change(&order)
			err := order.ValidateBind()
			if c.want == "" {
				must.NoError(t, err)
				order.ChatID, order.AgentID, order.VolumeHostPath, order.Note = "", "", "", ""
				must.NoError(t, order.ValidateLook())
				return
			}
			must.ErrorContains(t, err, c.want)
		})
	}
}

func TestClient(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		body   string
		want   error  // nil: none
		text   string // of the error
	}{
		"done":       {http.StatusNoContent, "", nil, ""},
		"invalid":    {http.StatusBadRequest, `{"error":"no such folder"}`, runtime.ErrInvalid, "no such folder"},
		"too large":  {http.StatusRequestEntityTooLarge, ``, runtime.ErrInvalid, "413"},
		"stranger":   {http.StatusUnauthorized, `{"error":"x"}`, runtime.ErrPermission, "x"},
		"forbidden":  {http.StatusForbidden, `{"error":"x"}`, runtime.ErrPermission, "x"},
		"not here":   {http.StatusNotFound, `{"error":"sandbox not found: x"}`, runtime.ErrNotFound, ": sandbox not found: x"},
		"other chat": {http.StatusConflict, `{"error":"x"}`, runtime.ErrConflict, "x"},
		"busy":       {http.StatusServiceUnavailable, `{"error":"x"}`, runtime.ErrUnavailable, "x"},
		"no JSON":    {http.StatusConflict, `<html>`, runtime.ErrConflict, "409"},
		"redirect":   {http.StatusTemporaryRedirect, ``, runtime.ErrUnavailable, "307"},
		"no helper":  {http.StatusOK, `hello`, runtime.ErrUnavailable, "200"},
		"endless":    {http.StatusConflict, `{"error":"` + strings.Repeat("x", 1<<20) + `"}`, runtime.ErrConflict, "409"},
	} {
		t.Run(name, func(t *testing.T) {
			var paths []string
			server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				paths = append(paths, r.Method+" "+r.URL.Path)
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(c.status)
				_, _ = w.Write([]byte(c.body)) // the client may have gone
			}))
			defer server.Close()
			client, address := nodeapi.New(server.Client()), server.Listener.Addr().String()
			for _, err := range []error{client.Bind(t.Context(), address, validOrder()), client.Look(t.Context(), address, validOrder())} {
				if c.want == nil {
					must.NoError(t, err)
					continue
				}
				must.ErrorIs(t, err, c.want)
				must.StrContains(t, err.Error(), c.text)
				must.Less(t, 500, len(err.Error()))
				must.Eq(t, c.want == runtime.ErrUnavailable || c.want == runtime.ErrPermission, errors.Is(err, runtime.ErrUnavailable)) //nolint:errorlint // compares the wanted ones
			}
			_, err := client.Bound(t.Context(), address, "a version")
			must.ErrorIs(t, err, cmp.Or(c.want, runtime.ErrUnavailable)) // 204 is no answer to it
			must.Eq(t, []string{"POST /v1/bind", "POST /v1/look", "GET /v1/bound"}, paths)
		})
	}
	t.Run("bound", func(t *testing.T) {
		want := nodeapi.Bound{Version: "2", Orders: []nodeapi.Order{validOrder(), {}}}
		server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			must.Eq(t, "1 & x", r.URL.Query().Get("known"))
			must.NoError(t, json.NewEncoder(w).Encode(want))
		}))
		defer server.Close()
		got, err := nodeapi.New(server.Client()).Bound(t.Context(), server.Listener.Addr().String(), "1 & x")
		must.NoError(t, err)
		must.Eq(t, want, got)
	})
	t.Run("no server", func(t *testing.T) {
		must.ErrorIs(t, nodeapi.New(new(http.Client)).Bind(t.Context(), "127.0.0.1:1", validOrder()), runtime.ErrUnavailable)
	})
}
