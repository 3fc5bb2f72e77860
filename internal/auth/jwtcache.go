package auth

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/bivouac/bivouac/scheduler"
)

// maxVerified is how many tokens the cache remembers.
const maxVerified = 4096

// verified is what is known of a token that was accepted.
type verified struct {
	caller scheduler.Caller
	keys   *Keys
	set    *keySet // the keys at that time
}

// cache remembers tokens that were accepted, by their SHA-256.
type cache struct {
	mu      sync.Mutex
	entries map[[sha256.Size]byte]verified
}

// get returns who sent a token, if that still holds.
func (c *cache) get(digest [sha256.Size]byte) (scheduler.Caller, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.entries[digest]
	if ok && (!time.Now().Before(v.caller.Expires) || v.keys.current.Load() != v.set) {
		delete(c.entries, digest)
		return scheduler.Caller{}, false
	}
	return v.caller, ok
}

// put adds a token. If the cache is full, another token is forgotten, and is verified
// again when it comes.
func (c *cache) put(digest [sha256.Size]byte, v verified) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.entries) >= maxVerified {
		for other := range c.entries {
			delete(c.entries, other)
			break
		}
	}
	c.entries[digest] = v
}
