package main

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/bivouac/bivouac/internal/test/faultproxy"
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
// Consul or Nomad agent on the replica's machine.
type proxy struct {
	*faultproxy.Proxy

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
	p := &proxy{healed: make(chan struct{}), random: rand.New(rand.NewPCG(seed, 1))}
	close(p.healed)
	var err error
	p.Proxy, err = faultproxy.Start("127.0.0.1:0", p.handle, servers...)
	return p, err
}

func (p *proxy) stop() {
	p.trouble(trouble{})
	p.Close()
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

// pass waits while the proxy is cut. It ends the request if its sender is gone.
func (p *proxy) pass(ctx context.Context) {
	p.mu.Lock()
	healed := p.healed
	p.mu.Unlock()
	select {
	case <-healed:
	case <-ctx.Done():
		panic(http.ErrAbortHandler)
	}
}

func (p *proxy) handle(w http.ResponseWriter, r *http.Request, server http.Handler) {
	_ = faultproxy.Body(r) // wait until all of the request is here
	through := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.forward(w, r, server) })
	fate, how := p.draw()
	switch fate {
	case refused:
		w.WriteHeader(http.StatusTooManyRequests)
		return
	case requestLost:
		faultproxy.Drop(w, r, through)
	case replyLost:
		faultproxy.LoseReply(w, r, through)
	case isLate:
		<-time.After(time.Duration(how * float64(maxLate)))
		r = r.WithContext(context.WithoutCancel(r.Context()))
	case untouched:
	}
	if how < 0.5 { // otherwise the answer is held back
		p.pass(r.Context())
	}
	through(w, r)
}

// forward passes a request on, as it was edited. It holds back the answer while
// the proxy is cut.
func (p *proxy) forward(w http.ResponseWriter, r *http.Request, server http.Handler) {
	body := faultproxy.Body(r)
	p.mu.Lock()
	edit := p.edit
	p.mu.Unlock()
	if edit != nil {
		body = edit(r, body)
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	server.ServeHTTP(&reply{w, p, r, body}, r)
}

// reply is an answer on its way to the replica.
type reply struct {
	http.ResponseWriter
	proxy *proxy
	r     *http.Request
	body  []byte // of the request
}

// Unwrap lets [http.ResponseController] flush the answer.
func (a *reply) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *reply) WriteHeader(status int) {
	a.proxy.mu.Lock()
	spy := a.proxy.spy
	a.proxy.mu.Unlock()
	if spy != nil && status == http.StatusOK {
		spy(a.r, a.body)
	}
	a.proxy.pass(a.r.Context())
	a.ResponseWriter.WriteHeader(status)
}

func (a *reply) Write(text []byte) (int, error) {
	a.proxy.pass(a.r.Context())
	return a.ResponseWriter.Write(text)
}
