package consul

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/simulate/consulmodel"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/scheduler"
)

// inspected is a model of Consul that calls inspect before each request. If that returns a
// response, the model does not get the request.
type inspected struct {
	*consulmodel.Server
	inspect func(req *http.Request, body []byte) *http.Response
}

func (s inspected) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	if response := s.inspect(req, body); response != nil {
		return response
	}
	return s.Server.Serve(ctx, req, body)
}

// runInspected runs a replica on such a model until the test ends. It must be called in a
// synctest bubble.
func runInspected(t *testing.T, reach *api.Config, token *credentials.Token, inspect func(*http.Request, []byte) *http.Response) (*Store, *consulmodel.Server) {
	t.Helper()
	server := inspected{consulmodel.New(2), inspect}
	reach.HttpClient = &http.Client{Transport: network.Direct{Server: server}}
	client, err := NewClient(reach, token)
	must.NoError(t, err)
	clock, err := NewClock(client, DefaultPrefix, time.Now, hclog.NewNullLogger())
	must.NoError(t, err)
	store, err := New(client, Config{
		Instance: "test", Name: "here", Logger: hclog.NewNullLogger(), Clock: clock,
		Namespace: reach.Namespace, Partition: reach.Partition,
	})
	must.NoError(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = store.Run(ctx) })
	running.Go(func() { _ = clock.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
		server.Close()
	})
	return store, server.Server
}

func TestEveryRequestHasNamespaceAndPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		seen := map[string]int{}
		var bare []string
		inspect := func(req *http.Request, body []byte) *http.Response {
			mu.Lock()
			defer mu.Unlock()
			note := func(what, namespace, partition string) {
				seen[what]++
				if namespace != "team" || partition != "east" {
					bare = append(bare, fmt.Sprintf("%s: namespace %q, partition %q", what, namespace, partition))
				}
			}
			query := req.URL.Query()
			note(operationOf(req), query.Get("ns"), query.Get("partition"))
			if req.URL.Path == "/v1/txn" {
				var ops []struct{ KV api.KVTxnOp }
				if err := json.Unmarshal(body, &ops); err != nil {
					t.Error(err)
				}
				for _, op := range ops {
					note(string(op.KV.Verb), op.KV.Namespace, op.KV.Partition)
				}
			}
			return nil
		}
		store, _ := runInspected(t, &api.Config{Namespace: "team", Partition: "east"}, nil, inspect)
		session := freshSession()
		put(t, store, session)
		_, index, err := store.Get(t.Context(), session.ChatID, scheduler.Block{})
		must.NoError(t, err)
		_, _, err = store.Get(t.Context(), session.ChatID, scheduler.Block{Index: index, Wait: time.Second})
		must.NoError(t, err)
		for _, agent := range []string{"", session.AgentID} {
			page, err := store.List(t.Context(), scheduler.Query{AgentID: agent, PerPage: 10})
			must.NoError(t, err)
			must.SliceLen(t, 1, page.Sessions)
		}
		_, err = store.Count(t.Context())
		must.NoError(t, err)
		_, err = store.Expired(t.Context(), time.Now(), 10)
		must.NoError(t, err)
		must.NoError(t, store.Health(t.Context()))
		lease := lock(t, store, session.ChatID)
		must.NoError(t, lease.Write(t.Context(), nil, scheduler.Release))

		mu.Lock()
		defer mu.Unlock()
		must.SliceEmpty(t, bare)
		for _, what := range []string{
			"read", "blocking_read", "write", "session", "txn", "other",
			string(api.KVLock), string(api.KVGetOrEmpty), string(api.KVCheckIndex), string(api.KVCAS), string(api.KVGetTree),
			string(api.KVSet), string(api.KVDelete), string(api.KVDeleteCAS),
		} {
			must.Positive(t, seen[what], must.Sprint(what))
		}
	})
}

// TestHealthTellsOfANamespaceThatConsulDoesNotHave covers a namespace or partition of Consul
// Enterprise in Consul's free edition, which has none.
func TestHealthTellsOfANamespaceThatConsulDoesNotHave(t *testing.T) {
	c := open(t)
	for parameter, reach := range map[string]*api.Config{"ns": {Namespace: "team"}, "partition": {Partition: "east"}} {
		reach.Address = c.addr
		client, err := NewClient(reach, nil)
		must.NoError(t, err)
		r := c.joinWith(t, client, nil)
		must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(func() error {
			err := r.Health(t.Context())
			if err != nil && strings.Contains(err.Error(), `Invalid query parameter: "`+parameter+`"`) {
				return nil
			}
			return fmt.Errorf("health: %w", err)
		}), wait.Timeout(patience), wait.Gap(10*time.Millisecond)))
	}
}

// TestTokenFile checks what becomes of held locks if Consul no longer accepts the token
// that a replica began with.
func TestTokenFile(t *testing.T) {
	// replace runs a replica that holds a lock, makes Consul accept only the second token,
	// and writes that to the file later.
	replace := func(t *testing.T, later time.Duration, check func(t *testing.T, store *Store, lease scheduler.Lease, sameSession func() bool)) {
		path := filepath.Join(t.TempDir(), "token")
		must.NoError(t, os.WriteFile(path, []byte("first\n"), 0o600))
		synctest.Test(t, func(t *testing.T) {
			token, err := credentials.TokenFile(path)
			must.NoError(t, err)
			var accepted atomic.Value
			accepted.Store("first")
			store, _ := runInspected(t, &api.Config{}, token, func(req *http.Request, _ []byte) *http.Response {
				if req.Header.Get("X-Consul-Token") == accepted.Load() {
					return nil
				}
				return network.Text(http.StatusForbidden, "ACL not found")
			})
			lease := lock(t, store, uuid.New())
			hold, err := store.session.current(t.Context())
			must.NoError(t, err)
			accepted.Store("second")
			pass(later)
			must.NoError(t, os.WriteFile(path, []byte("second\n"), 0o600))
			check(t, store, lease, func() bool {
				now, err := store.session.current(t.Context())
				return err == nil && now.session == hold.session
			})
		})
	}
	write := func(t *testing.T, lease scheduler.Lease) error {
		t.Helper()
		session := freshSession()
		session.ChatID = lease.(*Lease).chatID
		return lease.Write(t.Context(), &session, scheduler.Release)
	}
	t.Run("replaced in time loses no lock and no session", func(t *testing.T) {
		replace(t, 5*time.Second, func(t *testing.T, store *Store, lease scheduler.Lease, sameSession func() bool) {
			pass(5 * sessionTTL)
			must.True(t, sameSession())
			must.NoError(t, write(t, lease))
			must.NoError(t, store.Health(t.Context()))
		})
	})
	t.Run("replaced just now fails no write", func(t *testing.T) {
		replace(t, 0, func(t *testing.T, store *Store, lease scheduler.Lease, sameSession func() bool) {
			must.NoError(t, write(t, lease))
			must.True(t, sameSession())
		})
	})
	t.Run("replaced too late loses the lock, and the replica continues", func(t *testing.T) {
		replace(t, sessionTTL, func(t *testing.T, store *Store, lease scheduler.Lease, sameSession func() bool) {
			must.ErrorIs(t, write(t, lease), scheduler.ErrLockLost)
			pass(5 * sessionTTL)
			must.False(t, sameSession())
			must.NoError(t, store.Health(t.Context()))
			must.NoError(t, lock(t, store, uuid.New()).Release(t.Context()))
		})
	})
}

func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "consul.sock")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	must.NoError(t, err)
	var opened atomic.Int32
	all := make(chan struct{}) // closed once as many requests are there as may be
	arrived := make(chan struct{}, 2*maxConns)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		arrived <- struct{}{}
		<-all
		_, _ = w.Write([]byte(`"127.0.0.1:8300"`))
	}))
	must.NoError(t, server.Listener.Close())
	server.Listener = listener
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	client, err := NewClient(&api.Config{Address: "unix://" + path}, nil)
	must.NoError(t, err)

	var requests sync.WaitGroup
	for range maxConns + 20 {
		requests.Go(func() {
			if _, err := client.Status().Leader(); err != nil {
				t.Error(err)
			}
		})
	}
	for range maxConns {
		<-arrived
	}
	close(all)
	requests.Wait()
	must.EqOp(t, maxConns, opened.Load()) // the other requests used connections again
}
