package node

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/runtime"
)

func TestBound(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.Docker)
	bound := func(known string) nodeapi.Bound {
		t.Helper()
		all, err := b.client.Bound(t.Context(), b.address, known)
		must.NoError(t, err)
		return all
	}
	none := bound("")
	must.SliceEmpty(t, none.Orders)
	next := make(chan nodeapi.Bound, 1)
	go func() {
		all, _ := b.client.Bound(context.Background(), b.address, none.Version)
		next <- all
	}()
	order := b.bindOrder(s)
	order.Note = `{"a":"note"}`
	must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
	must.Eq(t, none, bound("")) // a look changes nothing
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))
	first := <-next
	must.Eq(t, []nodeapi.Order{order}, first.Orders)
	must.Eq(t, first, bound(none.Version))

	again := order
	again.Note = "another note"
	must.NoError(t, b.client.Bind(t.Context(), b.address, again))
	must.Eq(t, first, bound(""))

	// A helper that starts again knows what the one before has bound.
	b.restart()
	second := bound(first.Version)
	must.Eq(t, first.Orders, second.Orders)
	must.NotEq(t, first.Version, second.Version)

	// What cannot be read hides nothing else.
	bad := filepath.Join(b.config.Records, uuid.NewString()+recordSuffix)
	must.NoError(t, os.WriteFile(bad, []byte("x"), 0o600))
	must.Eq(t, first.Orders, bound("").Orders)
	must.NoError(t, os.Remove(bad))

	all := b.binder()
	before, err := all.bound(t.Context(), "")
	must.NoError(t, err)
	must.Eq(t, first.Orders, before.Orders)
	woken := make(chan nodeapi.Bound, 1)
	go func() {
		after, _ := all.bound(context.Background(), before.Version)
		woken <- after
	}()
	s.end()
	all.sweep(t.Context())
	must.SliceEmpty(t, (<-woken).Orders)
}

// waiter is sandboxes of which nothing changes.
type waiter struct {
	sandboxes
	entered chan string // the known version
}

func (w waiter) bound(ctx context.Context, known string) (nodeapi.Bound, error) {
	w.entered <- known
	<-ctx.Done()
	return nodeapi.Bound{Version: known}, nil
}

func TestServer_that_stops_keeps_nobody_waiting(t *testing.T) {
	b := newBench(t)
	secure, err := credentials.LoadTLS(b.config.Files)
	must.NoError(t, err)
	listener, err := listen(t.Context(), "127.0.0.1:0", secure)
	must.NoError(t, err)
	ctx, stop := context.WithCancel(context.Background())
	all, stopped := waiter{entered: make(chan string)}, make(chan error, 1)
	go func() { stopped <- serveOrders(ctx, listener, all, nodeapi.ClientName, hclog.NewNullLogger()) }()
	answer := make(chan nodeapi.Bound, 1)
	go func() {
		bound, _ := b.client.Bound(context.Background(), listener.Addr().String(), "a version")
		answer <- bound
	}()
	must.Eq(t, "a version", <-all.entered)
	stop()
	must.Eq(t, nodeapi.Bound{Version: "a version"}, <-answer)
	must.NoError(t, <-stopped) // it would tell if a request had not ended in time
}

func TestClients(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.Docker)
	order := b.bindOrder(s)
	stranger := certs.NewCA(t)
	for name, c := range map[string]struct {
		client *http.Client
		want   error
	}{
		"no certificate":                        {b.httpClient(b.ca, b.ca, ""), runtime.ErrPermission},
		"a certificate of another CA":           {b.httpClient(b.ca, stranger, nodeapi.ClientName), runtime.ErrUnavailable},
		"the certificate of another helper":     {b.httpClient(b.ca, b.ca, nodeapi.ServerName), runtime.ErrPermission},
		"the certificate of a caller":           {b.httpClient(b.ca, b.ca, "chat.example"), runtime.ErrPermission},
		"a helper that the client cannot trust": {b.httpClient(stranger, b.ca, nodeapi.ClientName), runtime.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			client := nodeapi.New(c.client)
			bound, boundErr := client.Bound(t.Context(), b.address, "")
			must.SliceEmpty(t, bound.Orders)
			for what, err := range map[string]error{
				"look":  client.Look(t.Context(), b.address, s.order),
				"bind":  client.Bind(t.Context(), b.address, order),
				"bound": boundErr,
			} {
				t.Log(what, err)
				must.ErrorIs(t, err, c.want)
			}
			s.mustBeUnbound()
		})
	}
	t.Run("an expired certificate", func(t *testing.T) {
		expired := b.ca.IssueFor(t, -time.Minute, nodeapi.ClientName)
		must.ErrorIs(t, nodeapi.New(b.clientOf(b.ca, &expired)).Bind(t.Context(), b.address, order), runtime.ErrUnavailable)
	})
	t.Run("plain HTTP", func(t *testing.T) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+b.address+nodeapi.PathBind, strings.NewReader("{}"))
		must.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		must.NoError(t, err)
		defer resp.Body.Close()
		must.Eq(t, http.StatusBadRequest, resp.StatusCode)
	})
	t.Run("anybody may ask whether it is alive", func(t *testing.T) {
		must.Eq(t, http.StatusNoContent, b.send(b.httpClient(b.ca, b.ca, ""), http.MethodGet, nodeapi.PathLive, nil))
	})
}

func TestRequests(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.Docker)
	text, err := json.Marshal(b.bindOrder(s))
	must.NoError(t, err)
	client := b.httpClient(b.ca, b.ca, nodeapi.ClientName)
	for _, c := range []struct {
		name, method, path string
		body               []byte
		want               int
	}{
		{"a body that is too large", http.MethodPost, nodeapi.PathBind, slices.Concat([]byte(`{"session_id":"`), bytes.Repeat([]byte("x"), 8<<20), []byte(`"}`)), http.StatusRequestEntityTooLarge},
		{"no JSON", http.MethodPost, nodeapi.PathBind, []byte("x"), http.StatusBadRequest},
		{"no body", http.MethodPost, nodeapi.PathLook, nil, http.StatusBadRequest},
		{"an unknown field", http.MethodPost, nodeapi.PathBind, bytes.Replace(text, []byte("{"), []byte(`{"mode":"rw",`), 1), http.StatusBadRequest},
		{"another driver", http.MethodPost, nodeapi.PathBind, bytes.Replace(text, []byte(`"docker"`), []byte(`"qemu"`), 1), http.StatusBadRequest},
		{"a task with a path", http.MethodPost, nodeapi.PathBind, bytes.Replace(text, []byte(`"sandbox"`), []byte(`"../../x"`), 1), http.StatusBadRequest},
		{"the root as target", http.MethodPost, nodeapi.PathBind, bytes.Replace(text, []byte(`"/workspace"`), []byte(`"/"`), 1), http.StatusBadRequest},
		{"a target above the session file", http.MethodPost, nodeapi.PathBind, bytes.Replace(text, []byte(`"/workspace"`), []byte(`"/run"`), 1), http.StatusBadRequest},
		{"another order", http.MethodPost, "/v1/unbind", text, http.StatusNotFound},
		{"another method", http.MethodPut, nodeapi.PathBind, text, http.StatusMethodNotAllowed},
	} {
		t.Run(c.name, func(t *testing.T) {
			must.Eq(t, c.want, b.send(client, c.method, c.path, c.body))
			s.mustBeUnbound()
		})
	}
}

// send sends a request and returns the status of the answer.
func (b *bench) send(client *http.Client, method, path string, body []byte) int {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, "https://"+b.address+path, bytes.NewReader(body))
	must.NoError(b.t, err)
	resp, err := client.Do(req)
	must.NoError(b.t, err)
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	must.NoError(b.t, err)
	return resp.StatusCode
}
