package scheduler

import (
	"fmt"
	"sync"
)

// Places limits how many operations of a kind run at a time. The zero value has no
// limit.
type Places struct {
	limit, format string
	tokens        chan struct{}
}

// NewPlaces returns n places. limit is the limit's name in metrics. format says in
// errors that all places are taken; it gets n.
func NewPlaces(n int, limit, format string) Places {
	return Places{limit, format, make(chan struct{}, n)}
}

// Enter takes a place until leave is called. If all places are taken, it returns a
// [LimitError].
func (p Places) Enter() (leave func(), err error) {
	if p.tokens == nil {
		return func() {}, nil
	}
	select {
	case p.tokens <- struct{}{}:
		return func() { <-p.tokens }, nil
	default:
		return nil, &LimitError{p.limit, fmt.Sprintf(p.format, cap(p.tokens))}
	}
}

// EnterAll takes a place of each kind until leave is called. If one is refused, it takes
// none and returns that error.
func EnterAll(enters ...func() (leave func(), err error)) (leave func(), err error) {
	var leaves []func()
	leave = func() {
		for _, leave := range leaves {
			leave()
		}
	}
	for _, enter := range enters {
		one, err := enter()
		if err != nil {
			leave()
			return nil, err
		}
		leaves = append(leaves, one)
	}
	return leave, nil
}

// Shares limits how many operations of a kind run at a time for each key, such as a
// caller or a session. Make it with [NewShares].
type Shares struct {
	limit, format string
	n             int

	mu    sync.Mutex
	taken map[string]int // keys without an operation are left out
}

// NewShares returns n places for each key. limit is the limit's name in metrics. format
// says in errors that all places of a key are taken; it gets n.
func NewShares(n int, limit, format string) *Shares {
	return &Shares{limit: limit, format: format, n: n, taken: make(map[string]int)}
}

// Enter takes a place of a key until leave is called. If all its places are taken, it
// returns a [LimitError].
func (s *Shares) Enter(key string) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken[key] >= s.n {
		return nil, &LimitError{s.limit, fmt.Sprintf(s.format, s.n)}
	}
	s.taken[key]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.taken[key]--; s.taken[key] == 0 {
			delete(s.taken, key)
		}
	}), nil
}

// Of returns Enter for a key, for [EnterAll].
func (s *Shares) Of(key string) func() (leave func(), err error) {
	return func() (func(), error) { return s.Enter(key) }
}
