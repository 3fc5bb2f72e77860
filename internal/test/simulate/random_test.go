package simulate

import (
	"crypto/rand"
	"fmt"
	"hash/fnv"
	mathrand "math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// drawFrom makes crypto/rand and package uuid draw from the seed until the test
// ends.
func drawFrom(t *testing.T, seed uint64) {
	before := rand.Reader
	rand.Reader = &source{seed: seed, drawn: make(map[uint64]uint64)}
	uuid.SetRand(rand.Reader)
	t.Cleanup(func() {
		rand.Reader = before
		uuid.SetRand(nil)
	})
}

// source is a random source that depends on the seed, the time and the place in
// the code that draws. Goroutines that run at the same instant therefore do not
// change each other's draws, whichever goes first.
type source struct {
	seed uint64

	mu    sync.Mutex
	drawn map[uint64]uint64 // how often, by time and place
}

// Read implements [io.Reader].
func (s *source) Read(p []byte) (int, error) {
	place := fnv.New64a()
	_, _ = fmt.Fprint(place, time.Now().UnixNano())
	// Use names and lines, because addresses differ between builds.
	var callers [64]uintptr
	frames := runtime.CallersFrames(callers[:runtime.Callers(1, callers[:])])
	for more := true; more; {
		var frame runtime.Frame
		frame, more = frames.Next()
		_, _ = fmt.Fprint(place, frame.Function, frame.Line)
	}
	key := place.Sum64()
	s.mu.Lock()
	count := s.drawn[key]
	s.drawn[key]++
	s.mu.Unlock()
	rng := mathrand.New(mathrand.NewPCG(s.seed^key, count))
	for i := range p {
		p[i] = byte(rng.Uint64())
	}
	return len(p), nil
}
