// Package consulmodel is an in-memory Consul with the parts that Bivouac uses:
// KV pairs, transactions, locks, sessions with a TTL, lock-delay and blocking
// queries. It serves Consul's HTTP API with the semantics of Consul's servers.
//
// Its timers come from the time package, so it runs in simulated time inside a
// synctest bubble. A test suite asks the model and a real Consul the same
// questions and compares the answers. The package must never know what the keys
// mean.
package consulmodel

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// Server is the model. Create it with [New].
type Server struct {
	expireAfter time.Duration

	mu       sync.Mutex
	index    uint64 // of the raft log
	kvIndex  uint64 // of the last change to any key
	kv       map[string]*pair
	removed  map[string]uint64        // index of the last removal of each key
	watched  map[string]chan struct{} // by key, or by prefix that ends with a slash: closed when it changes
	sessions map[string]*session
	lastID   int
	delays   map[string]time.Time // by key: when its lock-delay ends
	leading  bool
}

type pair struct {
	Key         string
	CreateIndex uint64
	ModifyIndex uint64
	LockIndex   uint64
	Flags       uint64
	Value       []byte
	Session     string `json:",omitempty"`
}

// New returns an empty Consul with a leader. A session expires after expire
// times its TTL without a renewal. Consul itself uses 2; 1 is the minimum that
// it promises.
func New(expire float64) *Server {
	return &Server{
		expireAfter: time.Duration(expire * float64(time.Second)),
		index:       10,
		kvIndex:     1,
		kv:          make(map[string]*pair),
		removed:     make(map[string]uint64),
		watched:     make(map[string]chan struct{}),
		sessions:    make(map[string]*session),
		delays:      make(map[string]time.Time),
		leading:     true,
	}
}

// Close stops all timers.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, session := range s.sessions {
		session.timer.Stop()
	}
}

// LoseLeader leaves Consul without a leader, so that it answers every request
// with an error.
func (s *Server) LoseLeader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading = false
}

// ElectLeader gives Consul a new leader. Every session counts as just renewed.
// Lock-delays are forgotten, because they were in the old leader's memory.
func (s *Server) ElectLeader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading = true
	clear(s.delays)
	for _, session := range s.sessions {
		s.renew(session)
	}
}

// Keys returns the pairs whose keys begin with prefix, by key.
func (s *Server) Keys(prefix string) map[string]api.KVPair {
	s.mu.Lock()
	defer s.mu.Unlock()
	pairs := make(map[string]api.KVPair)
	for _, p := range s.below(prefix) {
		pairs[p.Key] = p.public()
	}
	return pairs
}

// DeleteKey removes a key, as an operator would by hand.
func (s *Server) DeleteKey(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	s.remove(key, s.index)
}

// SetKey writes a key, as an operator would by hand.
func (s *Server) SetKey(key, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	if _, err := s.apply(&api.KVTxnOp{Verb: api.KVSet, Key: key, Value: []byte(value)}); err != nil {
		panic(err)
	}
}

// Change replaces the pairs whose keys begin with prefix by the result of f, in
// one step, as a restored snapshot does. If f returns nil, nothing changes.
func (s *Server) Change(prefix string, f func(pairs map[string]api.KVPair) map[string]api.KVPair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stands := make(map[string]api.KVPair)
	for _, p := range s.below(prefix) {
		stands[p.Key] = p.public()
	}
	next := f(maps.Clone(stands))
	if next == nil {
		return
	}
	s.index++
	for _, key := range slices.Sorted(maps.Keys(stands)) {
		if _, ok := next[key]; !ok {
			s.remove(key, s.index)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(next)) {
		if p, ok := stands[key]; !ok || !bytes.Equal(p.Value, next[key].Value) {
			s.set(&pair{Key: key, Value: next[key].Value}, s.index, false)
		}
	}
}

func (p *pair) public() api.KVPair {
	return api.KVPair{Key: p.Key, Value: p.Value, ModifyIndex: p.ModifyIndex, Session: p.Session}
}

// Serve answers a request. ctx belongs to the connection.
func (s *Server) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	s.mu.Lock()
	leading := s.leading
	s.mu.Unlock()
	if !leading {
		return network.Text(http.StatusInternalServerError, "No cluster leader")
	}
	path := req.URL.Path
	switch {
	case req.Method == http.MethodPut && path == "/v1/txn":
		return s.serveTxn(body)
	case strings.HasPrefix(path, "/v1/session/") && req.Method == http.MethodPut:
		return s.serveSession(strings.TrimPrefix(path, "/v1/session/"), body)
	case strings.HasPrefix(path, "/v1/kv/") && req.Method == http.MethodPut:
		return s.servePut(strings.TrimPrefix(path, "/v1/kv/"), req.URL.Query().Get("cas"), body)
	case strings.HasPrefix(path, "/v1/kv/") && req.Method == http.MethodGet:
		return s.serveRead(ctx, strings.TrimPrefix(path, "/v1/kv/"), req)
	case path == "/v1/status/leader":
		return answer(http.StatusOK, 0, "127.0.0.1:8300")
	default:
		panic(fmt.Sprintf("consulmodel: no model of %s %s", req.Method, req.URL))
	}
}

// answer returns a response with the headers that Consul sets.
func answer(status int, index uint64, value any) *http.Response {
	var body []byte
	if value != nil {
		var err error
		if body, err = json.Marshal(value); err != nil {
			panic(err)
		}
	}
	resp := network.Answer(status, body)
	resp.Header.Set("X-Consul-Knownleader", "true")
	resp.Header.Set("X-Consul-Lastcontact", "0")
	if index != 0 {
		resp.Header.Set("X-Consul-Index", strconv.FormatUint(index, 10))
	}
	return resp
}

// servePut writes a key. If cas is set, it writes only if the key has that
// index.
func (s *Server) servePut(key, cas string, body []byte) *http.Response {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	op := &api.KVTxnOp{Verb: api.KVSet, Key: key, Value: body}
	if cas != "" {
		index, err := strconv.ParseUint(cas, 10, 64)
		if err != nil {
			return network.Text(http.StatusBadRequest, err.Error())
		}
		op.Verb, op.Index = api.KVCAS, index
	}
	_, err := s.apply(op)
	return answer(http.StatusOK, 0, err == nil)
}

// serveRead reads a key or the names of keys. If the request has an index, it
// blocks.
func (s *Server) serveRead(ctx context.Context, key string, req *http.Request) *http.Response {
	query := req.URL.Query()
	after, _ := strconv.ParseUint(query.Get("index"), 10, 64)
	var timeout <-chan time.Time
	if after > 0 {
		wait, err := time.ParseDuration(query.Get("wait"))
		if err != nil {
			wait = 5 * time.Minute
		}
		timer := time.NewTimer(wait + wait/32)
		defer timer.Stop()
		timeout = timer.C
	}
	read := func() (*http.Response, uint64, <-chan struct{}) {
		if query.Has("keys") {
			return s.listKeys(key, query.Get("separator"))
		}
		if query.Has("recurse") {
			return s.getTree(key)
		}
		return s.getKey(key)
	}
	missing := false
	for {
		resp, index, changed := read()
		// A key that was missing and still is has not changed.
		if after == 0 || index > after && (!missing || resp.StatusCode != http.StatusNotFound) {
			return resp
		}
		missing = missing || resp.StatusCode == http.StatusNotFound && !query.Has("recurse")
		select {
		case <-changed:
			continue
		case <-timeout:
		case <-ctx.Done():
		}
		resp, _, _ = read()
		return resp
	}
}

func (s *Server) getKey(key string) (*http.Response, uint64, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.watch(key)
	p := s.kv[key]
	if p == nil {
		return answer(http.StatusNotFound, s.kvIndex, nil), s.kvIndex, changed
	}
	return answer(http.StatusOK, p.ModifyIndex, []*pair{p}), p.ModifyIndex, changed
}

// getTree reads all pairs whose keys begin with a prefix, which must end with a slash. The
// index is that of the last change to any of them.
func (s *Server) getTree(prefix string) (*http.Response, uint64, <-chan struct{}) {
	if !strings.HasSuffix(prefix, "/") {
		panic("consulmodel: no model of a prefix that does not end with a slash")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.watch(prefix)
	var index uint64
	pairs := s.below(prefix)
	for _, p := range pairs {
		index = max(index, p.ModifyIndex)
	}
	for key, removal := range s.removed {
		if strings.HasPrefix(key, prefix) {
			index = max(index, removal)
		}
	}
	if index == 0 {
		index = s.kvIndex
	}
	if len(pairs) == 0 {
		return answer(http.StatusNotFound, index, nil), index, changed
	}
	return answer(http.StatusOK, index, pairs), index, changed
}

// listKeys lists the names of keys. Its channel is nil, because nothing here
// waits for a list to change.
func (s *Server) listKeys(prefix, separator string) (*http.Response, uint64, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := []string{}
	for _, p := range s.below(prefix) {
		name := p.Key
		if separator != "" {
			if i := strings.Index(name[len(prefix):], separator); i >= 0 {
				name = name[:len(prefix)+i+len(separator)]
			}
		}
		if len(names) == 0 || names[len(names)-1] != name {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return answer(http.StatusNotFound, max(s.kvIndex, 1), nil), s.kvIndex, nil
	}
	return answer(http.StatusOK, s.kvIndex, names), s.kvIndex, nil
}

// below returns the pairs whose keys begin with prefix, sorted by key.
func (s *Server) below(prefix string) []*pair {
	var pairs []*pair
	for key, p := range s.kv {
		if strings.HasPrefix(key, prefix) {
			pairs = append(pairs, p)
		}
	}
	slices.SortFunc(pairs, func(a, b *pair) int { return strings.Compare(a.Key, b.Key) })
	return pairs
}

// watch returns a channel that is closed when the key changes.
func (s *Server) watch(key string) <-chan struct{} {
	changed := s.watched[key]
	if changed == nil {
		changed = make(chan struct{})
		s.watched[key] = changed
	}
	return changed
}

// changedKey wakes the readers that wait for the key.
func (s *Server) changedKey(key string, index uint64) {
	s.kvIndex = index
	if changed := s.watched[key]; changed != nil {
		close(changed)
		delete(s.watched, key)
	}
	for prefix, changed := range s.watched {
		if strings.HasSuffix(prefix, "/") && strings.HasPrefix(key, prefix) {
			close(changed)
			delete(s.watched, prefix)
		}
	}
}
