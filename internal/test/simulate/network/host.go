package network

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

// Host is the machine of one replica, as the network sees it.
type Host struct {
	Name string

	mu      sync.Mutex
	resumed chan struct{} // not nil while paused; closed by Resume
	dead    chan struct{} // closed when it dies
}

// NewHost returns a running host.
func NewHost(name string) *Host { return &Host{Name: name, dead: make(chan struct{})} }

// Pause stops the host as SIGSTOP does, as far as others can see. It sends
// nothing and reads no answers until it is resumed. It then sends what it was
// about to send.
func (h *Host) Pause() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.resumed == nil {
		h.resumed = make(chan struct{})
	}
}

// Resume ends a Pause.
func (h *Host) Resume() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.resumed != nil {
		close(h.resumed)
		h.resumed = nil
	}
}

// Kill ends the host at once. Requests that it has already sent may still
// arrive.
func (h *Host) Kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.isDead() {
		close(h.dead)
	}
}

func (h *Host) isDead() bool {
	select {
	case <-h.dead:
		return true
	default:
		return false
	}
}

// awaitRunning waits while the host is paused and reports whether it was. It
// then waits for turn, so that no two requests continue at the same instant.
func (h *Host) awaitRunning(ctx context.Context, turn time.Duration) (slept bool) {
	for {
		h.mu.Lock()
		resumed := h.resumed
		h.mu.Unlock()
		if resumed == nil {
			return slept
		}
		slept = true
		select {
		case <-resumed:
			sleep(ctx, turn)
		case <-h.dead:
			return slept
		case <-ctx.Done():
			return slept
		}
	}
}

// connBody is the body of a response, as the host reads it.
type connBody struct {
	link   *Link
	turn   time.Duration
	ctx    context.Context // of the request
	from   io.ReadCloser
	hangUp context.CancelFunc
}

func (b *connBody) Read(p []byte) (int, error) {
	n, err := b.from.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		sleep(b.link.net.ctx, b.turn) // one event may break many connections
	}
	b.link.host.awaitRunning(b.link.net.ctx, b.turn)
	switch {
	case b.ctx.Err() != nil:
		return 0, b.ctx.Err()
	case b.link.host.isDead():
		return 0, ErrReset
	case !b.link.pass(b.turn):
		return 0, ErrReset
	default:
		return n, err
	}
}

func (b *connBody) Close() error {
	b.hangUp()
	return b.from.Close()
}

// Stream is a response body that is written while it is read. Writes do not
// block: a reader that falls behind by more than the buffer is cut off.
type Stream struct {
	ctx    context.Context
	lines  chan []byte
	rest   []byte
	once   sync.Once
	closed chan struct{}
}

// streamBuffer is how many writes a reader may fall behind.
const streamBuffer = 128

// NewStream returns a stream that ends when ctx is done.
func NewStream(ctx context.Context) *Stream {
	return &Stream{ctx: ctx, lines: make(chan []byte, streamBuffer), closed: make(chan struct{})}
}

// Write queues data for the reader and reports whether the stream is still
// open.
func (s *Stream) Write(data []byte) bool {
	select {
	case <-s.closed:
		return false
	default:
	}
	select {
	case s.lines <- data:
		return true
	default:
		_ = s.Close() // Close cannot fail
		return false
	}
}

// Read implements [io.Reader].
func (s *Stream) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		select {
		case s.rest = <-s.lines:
		case <-s.closed:
			return 0, io.ErrUnexpectedEOF
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// Close ends the stream. Both ends may call it.
func (s *Stream) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// After calls f after d, unless ctx is done by then.
func After(ctx context.Context, d time.Duration, f func()) {
	time.AfterFunc(d, func() {
		if ctx.Err() == nil {
			f()
		}
	})
}
