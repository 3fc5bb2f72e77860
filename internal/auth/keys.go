package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/scheduler"
)

const (
	// readLimit bounds one read of the keys, without the time that Nomad may hold a poll.
	readLimit = 5 * time.Second
	// extraEvery is the least time between two reads that unknown key IDs cause.
	extraEvery = 5 * time.Second
	// maxWaiting is how many requests may wait for such a read.
	maxWaiting = 64
	// Pauses after a failed read.
	minReread = 500 * time.Millisecond
	maxReread = 30 * time.Second
)

// Keys are the public keys of an issuer of JWTs. [Keys.Run] reads those of Nomad and of a
// URL again and again, and [Keys.Reload] those in a file. If a read fails, the last keys
// stay.
type Keys struct {
	source string // for messages, such as "https://example.org/jwks.json"
	// read returns the document with the keys. With wait, it may wait until it changes.
	// Only one read runs at a time.
	read  func(ctx context.Context, wait bool) ([]byte, error)
	parse func(document []byte) ([]jose.JSONWebKey, error)
	every time.Duration // pause between two reads
	log   hclog.Logger

	current atomic.Pointer[keySet]
	problem atomic.Pointer[error] // why the last read failed
	waiting scheduler.Places

	mu        sync.Mutex
	extra     *extraRead // the one that requests wait for; nil: none
	lastExtra time.Time
	interrupt context.CancelFunc // ends what Run does, so that it reads at once
}

// keySet is the keys of one moment. It does not change.
type keySet struct {
	document []byte
	keys     []jose.JSONWebKey
}

// extraRead is a read out of turn. Requests with an unknown key ID wait for it.
type extraRead struct{ done chan struct{} }

func newKeys(source string, every time.Duration, log hclog.Logger) *Keys {
	return &Keys{
		source: source, every: every, log: log,
		waiting:   scheduler.NewPlaces(maxWaiting, "jwt_keys", "%d requests already wait for the issuer's keys"),
		interrupt: func() {},
	}
}

// Health returns an error if no keys are known.
func (k *Keys) Health(context.Context) error {
	if set := k.current.Load(); set != nil && len(set.keys) > 0 {
		return nil
	}
	if problem := k.problem.Load(); problem != nil {
		return fmt.Errorf("no keys from %s: %w", k.source, *problem)
	}
	return fmt.Errorf("no keys from %s", k.source)
}

// Run reads the keys until ctx ends.
func (k *Keys) Run(ctx context.Context) error {
	again := backoff.Backoff{Min: minReread, Max: maxReread}
	var told backoff.Throttle
	for ctx.Err() == nil {
		turn, end, extra := k.begin(ctx)
		err := k.reread(turn, extra == nil)
		k.finish(extra)
		pause := k.every
		switch {
		case err == nil:
			again.Reset()
			told.Reset()
		case turn.Err() == nil:
			pause = again.Next()
			k.log.Log(told.Level(), "jwt_keys_not_read", "source", k.source, "error", err, "again_in", pause)
		}
		_ = backoff.Sleep(turn, pause) // returns early if a request needs the keys now
		end()
	}
	return ctx.Err()
}

// Reload reads the keys once and reports whether they have changed. Do not use it beside
// Run.
func (k *Keys) Reload() (changed bool, err error) {
	before := k.current.Load()
	if err := k.reread(context.Background(), false); err != nil {
		return false, fmt.Errorf("read the keys in %s: %w", k.source, err)
	}
	return k.current.Load() != before, nil
}

// begin begins a turn of Run. A request ends it early if it needs the keys now.
func (k *Keys) begin(ctx context.Context) (turn context.Context, end context.CancelFunc, asked *extraRead) {
	turn, end = context.WithCancel(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.interrupt = end
	return turn, end, k.extra
}

// finish lets the requests go on that waited for the read.
func (k *Keys) finish(asked *extraRead) {
	if asked == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.extra, k.lastExtra = nil, time.Now()
	close(asked.done)
}

func (k *Keys) reread(ctx context.Context, wait bool) error {
	document, err := k.read(ctx, wait)
	if err == nil {
		err = k.take(document)
	}
	switch {
	case err == nil:
		k.problem.Store(nil)
	case ctx.Err() == nil:
		k.problem.Store(&err)
	}
	return err
}

// take makes the keys in a document the current ones. If it is the same document as
// before, the key set stays the same one, and so do the tokens that it verified.
func (k *Keys) take(document []byte) error {
	if set := k.current.Load(); set != nil && bytes.Equal(set.document, document) {
		return nil
	}
	keys, err := k.parse(document)
	if err != nil {
		return err
	}
	k.current.Store(&keySet{document, keys})
	ids := make([]string, len(keys))
	for i, key := range keys {
		ids[i] = key.KeyID
	}
	k.log.Info("jwt_keys_changed", "source", k.source, "key_ids", ids)
	return nil
}

// refresh makes Run read the keys now, and waits until it did. It returns an error if that
// happened less than extraEvery ago, or if too many requests wait already. So any number of
// tokens with unknown key IDs causes one read in extraEvery. It returns nil at once if the
// keys are no longer those in seen.
func (k *Keys) refresh(ctx context.Context, seen *keySet) error {
	leave, err := k.waiting.Enter()
	if err != nil {
		return err
	}
	defer leave()
	asked, err := k.ask(seen)
	if err != nil || asked == nil {
		return err
	}
	select {
	case <-asked.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the issuer's keys: %w", ctx.Err())
	}
}

// ask returns the read to wait for, nil if there are newer keys than seen already.
func (k *Keys) ask(seen *keySet) (*extraRead, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current.Load() != seen {
		return nil, nil
	}
	if k.extra != nil {
		return k.extra, nil
	}
	if time.Since(k.lastExtra) < extraEvery {
		return nil, errors.New("the keys were read a moment ago")
	}
	k.extra = &extraRead{make(chan struct{})}
	k.interrupt()
	return k.extra, nil
}

// find returns the keys that may have signed a token with this key ID and algorithm. A
// key without an ID, such as each key of a PEM file, may have signed any token. A token
// without a key ID fits only a set of one key. known reports whether the set has the key
// ID; another set may have it if not.
func (s *keySet) find(id string, algorithm jose.SignatureAlgorithm) (keys []jose.JSONWebKey, known bool) {
	if s == nil {
		return nil, false
	}
	for _, key := range s.keys {
		if key.KeyID != "" && key.KeyID != id && (id != "" || len(s.keys) > 1) {
			continue
		}
		known = true
		if fits(key, algorithm) {
			keys = append(keys, key)
		}
	}
	return keys, known
}

func (s *keySet) len() int {
	if s == nil {
		return 0
	}
	return len(s.keys)
}
