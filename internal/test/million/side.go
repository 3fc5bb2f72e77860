package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// side is a replica with its records, and a proxy between it and Consul.
type side struct {
	prefix        string
	records       int
	proxy         *faultproxy.Proxy
	passes        *passes
	server        *stack.Bivouac
	api           *apiclient.Client
	volume        string
	started       time.Duration // from its start until it served
	startRequests int64         // to Consul meanwhile
}

// startSide starts a replica on the records of a prefix, and waits until it serves. It
// cleans up nothing by itself. It is not its prefix's leader until a moment later.
func startSide(ctx context.Context, dir, binary, consul, prefix string, records int) (_ *side, err error) {
	s := &side{prefix: prefix, records: records, passes: newPasses(prefix), volume: filepath.Join(dir, "volume")}
	if s.proxy, err = faultproxy.Start("127.0.0.1:0", s.passes.handle, consul); err != nil {
		return nil, err
	}
	config, err := writeConfig(dir, prefix, records)
	if err != nil {
		return nil, err
	}
	port, err := stack.FreePort(0)
	if err != nil {
		return nil, err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	if s.api, err = apiclient.New(addr, nil); err != nil {
		return nil, err
	}
	env := append(os.Environ(), "CONSUL_HTTP_ADDR="+s.proxy.Addr(), "NOMAD_ADDR=")
	s.server, err = stack.NewBivouac(prefix, binary, addr, filepath.Join(dir, prefix+".log"), env,
		"-config="+config, "-runtime="+modelName, "-kv-prefix="+prefix+"/", "-instance="+prefix, "-cleanup-interval=1h", "-log-level=warn")
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := s.server.Start(); err != nil {
		return nil, err
	}
	if err := s.server.WaitReady(ctx); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	s.started, s.startRequests = time.Since(began), s.passes.requests.Load()
	return s, nil
}

// writeConfig writes the configuration file of a replica: this program is its plugin.
func writeConfig(dir, prefix string, records int) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, prefix+".hcl")
	text := fmt.Sprintf("plugin %q {\n  path = %q\n  args = [%q]\n  config {\n    standing = %d\n  }\n}\n", modelName, self, serveModel, records)
	return file, os.WriteFile(file, []byte(text), 0o600)
}

// stop stops the replica. It keeps its records.
func (s *side) stop() error {
	err := s.server.Stop()
	s.proxy.Close()
	return err
}

// memory returns what the replica and its plugin use.
func (s *side) memory() (replica, plugin memory, err error) {
	child, err := childOf(s.server.PID())
	if err != nil {
		return memory{}, memory{}, err
	}
	replica, err = memoryOf(s.server.PID())
	if err != nil {
		return memory{}, memory{}, err
	}
	plugin, err = memoryOf(child)
	return replica, plugin, err
}

// passes counts the requests of a replica to Consul, and watches them for passes that read
// all records.
type passes struct {
	requests atomic.Int64

	first, last string // what requests for the first and the last shard contain
	done        chan onePass

	mu      sync.Mutex
	current *onePass // nil: no pass has begun
}

// onePass is a pass that reads all records, as its requests show it.
type onePass struct {
	began       time.Time
	took        time.Duration
	requests    map[int]int   // by the second in which they began
	bytes       map[int]int64 // of their answers
	maxRequests int           // in one second
	maxBytes    int64
}

func newPasses(prefix string) *passes {
	return &passes{
		first: prefix + "/v1/sessions/00/\"", last: prefix + "/v1/sessions/ff/\"",
		done: make(chan onePass, 1),
	}
}

// handle is a [faultproxy.Handler].
func (p *passes) handle(w http.ResponseWriter, r *http.Request, server http.Handler) {
	p.requests.Add(1)
	if !strings.HasSuffix(r.URL.Path, "/txn") {
		server.ServeHTTP(w, r)
		return
	}
	body := string(faultproxy.Body(r))
	if !strings.Contains(body, string(api.KVGetTree)) || !strings.Contains(body, "/v1/sessions/") {
		server.ServeHTTP(w, r)
		return
	}
	p.mu.Lock()
	if strings.Contains(body, p.first) {
		p.current = &onePass{began: time.Now(), requests: map[int]int{}, bytes: map[int]int64{}}
	}
	pass := p.current
	p.mu.Unlock()
	counted := &countingWriter{ResponseWriter: w}
	began := time.Now()
	server.ServeHTTP(counted, r)
	if pass == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	second := int(began.Sub(pass.began) / time.Second)
	pass.requests[second]++
	pass.bytes[second] += counted.bytes
	pass.maxRequests, pass.maxBytes = max(pass.maxRequests, pass.requests[second]), max(pass.maxBytes, pass.bytes[second])
	if strings.Contains(body, p.last) && pass == p.current {
		pass.took, p.current = time.Since(pass.began), nil
		select {
		case <-p.done: // nobody wanted the one before
		default:
		}
		p.done <- *pass
	}
}

// next returns the next pass that begins and ends after this call.
func (p *passes) next(ctx context.Context) (onePass, error) {
	called := time.Now()
	for {
		select {
		case pass := <-p.done:
			if pass.began.After(called) {
				return pass, nil
			}
		case <-ctx.Done():
			return onePass{}, ctx.Err()
		}
	}
}

// countingWriter counts the bytes of an answer.
type countingWriter struct {
	http.ResponseWriter
	bytes int64
}

func (w *countingWriter) Write(text []byte) (int, error) {
	n, err := w.ResponseWriter.Write(text)
	w.bytes += int64(n)
	return n, err
}

// Unwrap lets an [http.ResponseController] find the connection.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
