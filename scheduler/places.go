package scheduler

import "fmt"

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
