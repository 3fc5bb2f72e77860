package pluginhost

import (
	"sync"

	"github.com/bivouac/bivouac/runtime"
)

// maxOwners bounds how many of a plugin's sandboxes are remembered.
const maxOwners = 250_000

// owners remembers which session each container belongs to, as far as the host has seen
// it. The zero value is ready for use.
type owners struct {
	mu        sync.Mutex
	session   map[string]string // by container
	container map[string]string // by session
}

// claim records a sandbox. If its container is known to belong to another session,
// claim records nothing and returns that session and true.
func (o *owners) claim(sandbox runtime.Sandbox) (string, bool) {
	if sandbox.ContainerID == "" || sandbox.State == runtime.StateDead {
		return "", false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if other, ok := o.session[sandbox.ContainerID]; ok && other != sandbox.SessionID {
		return other, true
	}
	o.note(sandbox)
	return "", false
}

// replace records a sandbox and overwrites what is known about its container.
func (o *owners) replace(sandbox runtime.Sandbox) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if other, ok := o.session[sandbox.ContainerID]; ok {
		delete(o.container, other)
	}
	o.note(sandbox)
}

func (o *owners) note(sandbox runtime.Sandbox) {
	if o.session == nil || len(o.session) >= maxOwners {
		o.session, o.container = map[string]string{}, map[string]string{}
	}
	if old, ok := o.container[sandbox.SessionID]; ok && old != sandbox.ContainerID {
		delete(o.session, old)
	}
	o.session[sandbox.ContainerID] = sandbox.SessionID
	o.container[sandbox.SessionID] = sandbox.ContainerID
}

// release forgets a session.
func (o *owners) release(sessionID string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if container, ok := o.container[sessionID]; ok {
		delete(o.session, container)
		delete(o.container, sessionID)
	}
}
