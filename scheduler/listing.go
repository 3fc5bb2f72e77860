package scheduler

import (
	"hash/maphash"
	"iter"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

// listing is all sandboxes of a driver, to be compared with the records. There may be a
// million of them, so it keeps only what the comparison needs, in less than 150 bytes for
// each.
type listing struct {
	seed   maphash.Seed
	briefs map[uuid.UUID]brief        // by session ID
	whole  map[string]runtime.Sandbox // those of spares, or with other IDs than Bivouac makes
}

// brief is what a listing keeps of a sandbox.
type brief struct {
	chat      uuid.UUID
	container uint64 // hash of the container's ID; 0: it has none
	state     runtime.State
}

func newListing() listing {
	return listing{seed: maphash.MakeSeed(), briefs: make(map[uuid.UUID]brief), whole: make(map[string]runtime.Sandbox)}
}

func (l listing) add(sandbox runtime.Sandbox) {
	session, err := uuid.Parse(sandbox.SessionID)
	chat, chatErr := uuid.Parse(sandbox.ChatID)
	if err != nil || chatErr != nil || session.String() != sandbox.SessionID || chat.String() != sandbox.ChatID {
		l.whole[sandbox.SessionID] = sandbox
		return
	}
	l.briefs[session] = brief{chat, l.hash(sandbox.ContainerID), sandbox.State}
}

func (l listing) hash(container string) uint64 {
	if container == "" {
		return 0
	}
	return max(maphash.String(l.seed, container), 1)
}

// take removes the sandbox of a recorded session from the listing, and returns it as far
// as it can be compared with the record: the ID of another container than the recorded
// one is not known.
func (l listing) take(session Session) (sandbox runtime.Sandbox, ok bool) {
	b, ok := l.briefs[session.SessionID]
	if !ok {
		sandbox, ok = l.whole[session.SessionID.String()]
		delete(l.whole, session.SessionID.String())
		return sandbox, ok
	}
	delete(l.briefs, session.SessionID)
	sandbox = b.sandbox(session.SessionID)
	switch b.container {
	case 0:
	case l.hash(session.ContainerID):
		sandbox.ContainerID = session.ContainerID
	default:
		sandbox.ContainerID = "another than " + session.ContainerID
	}
	return sandbox, true
}

// dropSpare removes the sandbox of a recorded spare from the listing, unless a chat has
// claimed it: then the record of the spare is from an old state of the store.
func (l listing) dropSpare(session uuid.UUID) {
	if l.whole[session.String()].ChatID == "" {
		delete(l.whole, session.String())
	}
}

func (b brief) sandbox(session uuid.UUID) runtime.Sandbox {
	return runtime.Sandbox{SessionID: session.String(), ChatID: b.chat.String(), State: b.state}
}

// rest yields the sandboxes that were not taken and are not dead, without most of their
// fields.
func (l listing) rest() iter.Seq[runtime.Sandbox] {
	return func(yield func(runtime.Sandbox) bool) {
		for session, b := range l.briefs {
			if b.state != runtime.StateDead && !yield(b.sandbox(session)) {
				return
			}
		}
		for _, sandbox := range l.whole {
			if sandbox.State != runtime.StateDead && !yield(sandbox) {
				return
			}
		}
	}
}
