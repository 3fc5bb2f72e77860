package scheduler

import (
	"cmp"
	"math"
	"slices"
)

// ring holds the newest changes, up to a number of bytes. A position in it is the number
// of changes that were added before, so positions stay valid while old changes make room.
type ring struct {
	most    int      // bytes
	changes []Change // never overwritten, so that readers may use parts of it
	size    int      // of changes, in bytes
	start   int      // the position of the oldest change
	last    uint64   // the index of the newest change; 0: none
	known   uint64   // the highest index that the store is known to have reached
	// complete is the lowest index of which it is known that all changes after it are in
	// the ring; math.MaxUint64 if there is none.
	complete uint64
	tooOld   uint64 // the highest index of which it is known that a change after it is missing
}

// newRing returns a ring whose positions begin at start.
func newRing(most, start int) *ring {
	return &ring{most: most, start: start, complete: math.MaxUint64}
}

// add adds the changes that are newer than the newest one, and returns them.
func (r *ring) add(changes []Change) []Change {
	known, _ := slices.BinarySearchFunc(changes, r.last+1, byIndex)
	added := changes[known:]
	if len(added) == 0 {
		return nil
	}
	r.complete = min(r.complete, added[0].Index-1)
	r.last = added[len(added)-1].Index
	r.known = max(r.known, r.last)
	for _, change := range added {
		r.size += sizeOf(change)
	}
	r.changes = append(r.changes, added...)
	for r.size > r.most && r.changes[0].Index != r.last {
		r.drop()
	}
	return added
}

// drop drops the changes of the oldest transaction.
func (r *ring) drop() {
	oldest, _ := r.part(r.start, 1)
	for _, change := range oldest {
		r.size -= sizeOf(change)
	}
	r.complete = oldest[0].Index
	r.tooOld = r.complete - 1
	r.changes, r.start = r.changes[len(oldest):], r.start+len(oldest)
}

// end returns the position after the newest change.
func (r *ring) end() int { return r.start + len(r.changes) }

// part returns at most that many changes from a position on, and then the others of the
// last transaction. It returns false if changes after the position are missing.
func (r *ring) part(position, most int) (_ []Change, ok bool) {
	if position < r.start {
		return nil, false
	}
	part := r.changes[position-r.start:]
	n := min(most, len(part))
	for 0 < n && n < len(part) && part[n].Index == part[n-1].Index {
		n++
	}
	return part[:n:n], true
}

// after returns the position after the changes with at most this index.
func (r *ring) after(index uint64) int {
	n, _ := slices.BinarySearchFunc(r.changes, index, func(c Change, index uint64) int {
		if c.Index <= index {
			return -1
		}
		return 1
	})
	return r.start + n
}

// at returns the changes of a transaction.
func (r *ring) at(index uint64) []Change {
	first, _ := slices.BinarySearchFunc(r.changes, index, byIndex)
	return r.changes[first : r.after(index)-r.start]
}

// confirm notes that the store has reached an index and has dropped no change after it. The
// ring must have got all that the store had, and index must be above tooOld.
func (r *ring) confirm(index uint64) {
	r.known, r.complete = max(r.known, index), min(r.complete, index)
}

func byIndex(change Change, index uint64) int { return cmp.Compare(change.Index, index) }

// sizeOf returns about how much memory a change takes, in bytes.
func sizeOf(c Change) int {
	const fixed = 256
	return fixed + len(c.Pool) + len(c.AgentID) + len(c.Runtime) + len(c.Reason) + len(c.Caller) + len(c.RequestID)
}
