package nomad

import "sync"

const (
	// maxRecent bounds how many of its own actions a driver remembers. It only has to
	// remember them until running requests and late events have arrived.
	maxRecent = 4096
	// maxPast bounds how many purged jobs it remembers. One takes a few KB.
	maxPast = 1024
)

// recent has the most recently added names, each with a value.
type recent[V any] struct {
	mu     sync.Mutex
	ring   []string
	next   int
	values map[string]V
}

func newRecent[V any](size int) *recent[V] {
	return &recent[V]{ring: make([]string, size), values: make(map[string]V)}
}

// add adds a name and reports whether it is new. If it is not, its value is replaced.
func (r *recent[V]) add(name string, value V) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, known := r.values[name]
	if !known {
		delete(r.values, r.ring[r.next])
		r.ring[r.next] = name
		r.next = (r.next + 1) % len(r.ring)
	}
	r.values[name] = value
	return !known
}

func (r *recent[V]) get(name string) (value V, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	value, ok = r.values[name]
	return value, ok
}

func (r *recent[V]) has(name string) bool {
	_, ok := r.get(name)
	return ok
}
