package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"
)

// trouble is how a proxy treats requests. The numbers are probabilities from 0
// to 1.
type trouble struct {
	loseRequest float64 // cut the connection before the server has the request
	loseReply   float64 // cut it after the server has answered
	late        float64 // deliver the request up to 3 s late, even if the caller has given up
	refuse      float64 // answer 429 instead of the server
	cut         bool    // hold everything back, in either direction
}

// proxy sits between a replica and the servers of Consul or Nomad, like a
// Consul or Nomad agent on the replica's machine. It uses the first server that
// it can reach.
type proxy struct {
	addr    string
	servers []string
	server  *http.Server
	back    *http.Transport
	served  chan struct{}

	mu     sync.Mutex
	now    trouble
	healed chan struct{} // closed while it is not cut
	spy    spy           // may be nil
	edit   edit          // may be nil
	random *rand.Rand
}

// edit changes the body of a request before the server gets it.
type edit func(r *http.Request, body []byte) []byte

// spy is called for each request that the server has carried out, before the
// answer is passed on.
type spy func(r *http.Request, body []byte)

func newProxy(servers []string, seed uint64) (*proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{
		addr:    listener.Addr().String(),
		servers: servers,
		back:    &http.Transport{MaxIdleConnsPerHost: 64, DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext},
		served:  make(chan struct{}),
		healed:  make(chan struct{}),
		random:  rand.New(rand.NewPCG(seed, 1)),
	}
	close(p.healed)
	through := &httputil.ReverseProxy{
		// This target is a placeholder: RoundTrip chooses the server.
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: servers[0]}) },
		Transport:     p,
		FlushInterval: -1,
		ErrorHandler:  func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	p.server = &http.Server{Handler: p.handler(through), ReadHeaderTimeout: time.Minute}
	go func() {
		defer close(p.served)
		_ = p.server.Serve(listener) // it serves until stop
	}()
	return p, nil
}

func (p *proxy) stop() {
	p.trouble(trouble{})
	_ = p.server.Close() // cuts the remaining connections
	<-p.served
	p.back.CloseIdleConnections()
}

// trouble sets how the proxy treats requests from now on.
func (p *proxy) trouble(t trouble) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case t.cut && !p.now.cut:
		p.healed = make(chan struct{})
	case !t.cut && p.now.cut:
		close(p.healed)
	}
	p.now = t
}

// tell sets the spy; nil removes it.
func (p *proxy) tell(s spy) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spy = s
}

// change sets the edit.
func (p *proxy) change(e edit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.edit = e
}

func (p *proxy) edited(r *http.Request, body []byte) []byte {
	p.mu.Lock()
	edit := p.edit
	p.mu.Unlock()
	if edit == nil {
		return body
	}
	return edit(r, body)
}

func (p *proxy) spied() spy {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.spy
}

// fate is what happens to one request.
type fate int

const (
	untouched fate = iota
	refused
	requestLost
	replyLost
	isLate
)

const maxLate = 3 * time.Second

// draw draws the fate of a request and its degree, from 0 to 1.
func (p *proxy) draw() (what fate, how float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	left, how := p.random.Float64(), p.random.Float64()
	for _, f := range []struct {
		what   fate
		chance float64
	}{{refused, p.now.refuse}, {requestLost, p.now.loseRequest}, {replyLost, p.now.loseReply}, {isLate, p.now.late}} {
		if left -= f.chance; left < 0 {
			return f.what, how
		}
	}
	return untouched, how
}

// pass waits while the proxy is cut.
func (p *proxy) pass(ctx context.Context) error {
	p.mu.Lock()
	healed := p.healed
	p.mu.Unlock()
	select {
	case <-healed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *proxy) handler(through http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		fate, how := p.draw()
		switch fate {
		case refused:
			w.WriteHeader(http.StatusTooManyRequests)
			return
		case requestLost:
			panic(http.ErrAbortHandler)
		case replyLost:
			through.ServeHTTP(&lostReply{header: make(http.Header)}, r)
			panic(http.ErrAbortHandler)
		case isLate:
			<-time.After(time.Duration(how * float64(maxLate)))
			r = r.WithContext(context.WithoutCancel(r.Context()))
		case untouched:
		}
		if how < 0.5 && p.pass(r.Context()) != nil { // otherwise RoundTrip holds back the answer
			panic(http.ErrAbortHandler)
		}
		through.ServeHTTP(w, r)
	})
}

// RoundTrip implements [http.RoundTripper].
func (p *proxy) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			return nil, err
		}
	}
	body = p.edited(r, body)
	var last error
	for _, server := range p.servers {
		try := r.Clone(r.Context())
		try.URL.Host, try.Host = server, server
		try.Body, try.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		if len(body) == 0 {
			try.Body = http.NoBody
		}
		res, err := p.back.RoundTrip(try)
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			last = err // the request reached no server
			continue
		}
		if err != nil {
			return nil, err
		}
		if spy := p.spied(); spy != nil && res.StatusCode == http.StatusOK {
			spy(r, body)
		}
		if err := p.pass(r.Context()); err != nil {
			_ = res.Body.Close() // the caller is gone
			return nil, err
		}
		res.Body = &heldBack{res.Body, p, r.Context()}
		return res, nil
	}
	return nil, last
}

// heldBack is the body of an answer. Its reads wait while the proxy is cut.
type heldBack struct {
	io.ReadCloser
	proxy *proxy
	ctx   context.Context
}

func (b *heldBack) Read(buf []byte) (int, error) {
	n, err := b.ReadCloser.Read(buf)
	if passErr := b.proxy.pass(b.ctx); passErr != nil {
		return 0, passErr
	}
	return n, err
}

// lostReply discards an answer.
type lostReply struct{ header http.Header }

func (l *lostReply) Header() http.Header            { return l.header }
func (l *lostReply) Write(text []byte) (int, error) { return len(text), nil }
func (l *lostReply) WriteHeader(int)                {}
