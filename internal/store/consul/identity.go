package consul

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/scheduler"
)

// identityVersion is increased with any change of [Identity], so that no replica acts
// on an identity that it does not fully understand.
const identityVersion = 1

// Identity identifies the Bivouac instance that the records below a prefix belong to.
// The first replica writes it to one key. Everything that the instance makes elsewhere
// has its instance ID. So two instances never share an ID, even if they have the same
// configured name, and a store that lost its data can be told from an empty one.
//
// Replicas from before identities do not check it. They mark what they make with the
// configured name, and LegacyInstance allows for that. But they take what newer
// replicas make for another instance's and may end it. So stop them before you start
// the first newer one.
type Identity struct {
	Version int `json:"v"`
	// Instance is the instance ID: the configured name, "-" and 20 random
	// letters and digits, 64 bytes of a-z, 0-9 and "-" at most.
	Instance string `json:"instance"`
	// LegacyInstance is the configured name if there were records from before
	// identities. Then what is marked with the name alone belongs to this instance
	// too, and plugins still get the name as their instance. So if two instances
	// shared a name then, what they made then still cannot be told apart.
	LegacyInstance string `json:"legacy_instance,omitempty"`
	Place
	CreatedAt time.Time `json:"created_at"`
}

// Place is where in Nomad the sandboxes run. An empty field is unknown and not
// compared.
type Place struct {
	Region    string `json:"nomad_region,omitempty"`
	Namespace string `json:"nomad_namespace,omitempty"`
}

const (
	randomLength  = 20
	maxNameLength = 64 - 1 - randomLength // longer names are cut off
)

func newInstance(name string) string {
	return shortName(name) + "-" + strings.ToLower(rand.Text()[:randomLength])
}

func shortName(name string) string { return name[:min(len(name), maxNameLength)] }

// isNamed reports whether an instance ID was made from a configured name.
func isNamed(instance, name string) bool {
	random, found := strings.CutPrefix(instance, shortName(name)+"-")
	return found && len(random) == randomLength && !strings.Contains(random, "-")
}

// errOtherBivouac is returned when the records belong to another Bivouac instance.
// It ends the replica.
var errOtherBivouac = errors.New("the records belong to another Bivouac")

// identityWait is how long one read of the identity waits for a change. The wait does
// not end early if Consul's index goes back because Consul lost its data.
const identityWait = 10 * time.Second

// identity follows the identity's key.
type identity struct {
	store  *Store
	config Config

	mu      sync.Mutex
	own     Identity           // this replica's identity; zero until it is known
	index   uint64             // the key's ModifyIndex, 0 while the key does not have own
	why     error              // why it does not, once that is known
	changed broadcast.Cond     // of these
	again   context.CancelFunc // ends the read that waits for a change
}

func newIdentity(store *Store, config Config) *identity {
	i := &identity{store: store, config: config, again: func() {}}
	i.changed.L = &i.mu
	return i
}

// run follows the key until ctx ends. It returns an error that wraps errOtherBivouac
// if the key belongs to another Bivouac instance.
func (i *identity) run(ctx context.Context) error {
	var block scheduler.Block
	var told backoff.Throttle
	pause := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ctx.Err() == nil {
		pair, index, err := i.read(ctx, block)
		read := err == nil
		if read {
			err = i.take(ctx, pair)
		}
		block = scheduler.Block{Index: index, Wait: identityWait}
		switch {
		case errors.Is(err, errOtherBivouac):
			return err
		case err == nil:
			pause.Reset()
			told.Reset()
			continue
		case ctx.Err() != nil:
			return nil //nolint:nilerr // nobody needs the identity any more
		}
		i.fail(err, read)
		i.store.log.Log(told.Level(), "identity_unknown", "error", err)
		block.Wait = pause.Next()
		if !read {
			block = scheduler.Block{}
			_ = backoff.Sleep(ctx, pause.Next())
		}
	}
	return nil
}

// read reads the key, and waits for a change as block says. [identity.look] ends the
// wait.
func (i *identity) read(ctx context.Context, block scheduler.Block) (*api.KVPair, uint64, error) {
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	i.mu.Lock()
	i.again = cancel
	i.mu.Unlock()
	pair, index, err := i.store.get(reading, i.store.keys.identity(), block)
	if err != nil && reading.Err() != nil && ctx.Err() == nil {
		return i.store.get(ctx, i.store.keys.identity(), scheduler.Block{})
	}
	return pair, index, err
}

// look makes run read the key at once.
func (i *identity) look() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.again()
}

// take acts on the key as it was read. If it writes the key, the next read takes that.
func (i *identity) take(ctx context.Context, pair *api.KVPair) error {
	i.mu.Lock()
	own := i.own
	i.mu.Unlock()
	switch {
	case pair == nil && own.Instance != "":
		return i.lost(own)
	case pair == nil:
		return i.first(ctx)
	}
	stands, err := decodeIdentity(pair)
	if err != nil {
		return err
	}
	if own.Instance != "" && own.Instance != stands.Instance {
		return fmt.Errorf("%w: the instance in key %s changed from %s to %s: start this replica again to work for the new one",
			errOtherBivouac, pair.Key, own.Instance, stands.Instance)
	}
	if own.Instance == "" {
		complete, err := i.check(ctx, pair.Key, stands)
		if err != nil {
			return err
		}
		if complete != stands {
			_, err := i.write(ctx, complete, pair.ModifyIndex)
			return err
		}
	}
	i.set(func() { i.own, i.index, i.why = stands, pair.ModifyIndex, nil })
	return nil
}

// check compares an identity with this replica's configuration, and returns it with
// its missing fields set.
func (i *identity) check(ctx context.Context, key string, stands Identity) (Identity, error) {
	if name := i.config.Instance; !isNamed(stands.Instance, name) && stands.LegacyInstance != name {
		theirs := stands.Instance[:max(0, len(stands.Instance)-1-randomLength)]
		return Identity{}, fmt.Errorf("%w: key %s belongs to instance %s, but this replica has -instance=%s: start it with -instance=%s to work for that instance, or with another -kv-prefix",
			errOtherBivouac, key, stands.Instance, name, theirs)
	}
	here, err := i.place(ctx)
	if err != nil {
		return Identity{}, err
	}
	if differ(stands.Region, here.Region) || differ(stands.Namespace, here.Namespace) {
		return Identity{}, fmt.Errorf("%w: the sandboxes of instance %s (key %s) are in Nomad's region %q, namespace %q, but those of this replica would be in region %q, namespace %q: set Nomad's region and namespace (NOMAD_REGION, NOMAD_NAMESPACE) to the first, or choose another -kv-prefix",
			errOtherBivouac, stands.Instance, key, stands.Region, stands.Namespace, here.Region, here.Namespace)
	}
	if stands.Region == "" {
		stands.Region = here.Region
	}
	if stands.Namespace == "" {
		stands.Namespace = here.Namespace
	}
	return stands, nil
}

func differ(a, b string) bool { return a != "" && b != "" && a != b }

func (i *identity) place(ctx context.Context) (Place, error) {
	if i.config.Place == nil {
		return Place{}, nil
	}
	place, err := i.config.Place(ctx)
	if err != nil {
		return Place{}, undecidable("cannot find out where in Nomad the sandboxes run: %s", err)
	}
	return place, nil
}

// running counts the running sandboxes whose instance ID is made from the configured
// name, or is the name alone.
func (i *identity) running(ctx context.Context) (map[string]int, error) {
	if i.config.Running == nil {
		return nil, nil
	}
	all, err := i.config.Running(ctx)
	if err != nil {
		return nil, undecidable("cannot find out whether sandboxes run: %s", err)
	}
	maps.DeleteFunc(all, func(instance string, _ int) bool {
		return instance != i.config.Instance && !isNamed(instance, i.config.Instance)
	})
	return all, nil
}

// first writes the identity of a store that has none. If sandboxes run whose records
// may be missing, it leaves the decision to an operator.
func (i *identity) first(ctx context.Context) error {
	fresh, err := i.fresh(ctx)
	if err != nil {
		return err
	}
	running, err := i.running(ctx)
	if err != nil {
		return err
	}
	records, err := i.hasRecords(ctx)
	if err != nil {
		return err
	}
	_, legacy := running[i.config.Instance]
	switch {
	case records && (len(running) == 0 || legacy && len(running) == 1):
		fresh.LegacyInstance = i.config.Instance // the records are from before identities
	case len(running) > 0: // safeguard: standing still without an identity
		return i.undecided(running)
	}
	_, err = i.write(ctx, fresh, 0)
	return err
}

func (i *identity) fresh(ctx context.Context) (Identity, error) {
	place, err := i.place(ctx)
	return Identity{
		Version: identityVersion, Instance: newInstance(i.config.Instance), Place: place, CreatedAt: time.Now().Round(0).UTC(),
	}, err
}

func (i *identity) hasRecords(ctx context.Context) (bool, error) {
	folders, _, err := i.store.list(ctx, i.store.keys.records(), "/", scheduler.Block{})
	return len(folders) > 0, err
}

// write writes the identity if the key has that index, 0 for no key. It returns
// whether it did.
func (i *identity) write(ctx context.Context, next Identity, index uint64) (bool, error) {
	value, err := json.Marshal(next)
	if err != nil {
		return false, fmt.Errorf("encode the identity: %w", err)
	}
	_, err = i.store.retryTxn(ctx, &api.KVTxnOp{Verb: api.KVCAS, Key: i.store.keys.identity(), Value: value, Index: index})
	if errors.Is(err, errRolledBack) {
		return false, nil // or it was written and the answer was lost: a read of the key shows which
	}
	return err == nil, err
}

func decodeIdentity(pair *api.KVPair) (Identity, error) {
	decoder := json.NewDecoder(bytes.NewReader(pair.Value))
	decoder.DisallowUnknownFields()
	var id Identity
	err := decoder.Decode(&id)
	switch {
	case err == nil && id.Version != identityVersion:
		err = fmt.Errorf("schema version %d, but this replica knows only version %d", id.Version, identityVersion)
	case err == nil && id.Instance == "":
		err = errors.New("instance missing")
	}
	if err != nil {
		return Identity{}, undecidable("key %s is not an identity: %s", pair.Key, err)
	}
	return id, nil
}

// undecidable returns the error that nothing may be done until the identity is clear.
// Callers get its text, so it says what to do.
func undecidable(format string, args ...any) error {
	why := fmt.Sprintf(format, args...)
	return &scheduler.UnavailableError{Reason: why, Detail: why}
}

func (i *identity) lost(own Identity) error {
	return undecidable("Consul lost the identity of this Bivouac instance (key %s, instance %s) and its records: nothing is created, ended or stopped until they are restored, or until `bivouac operator adopt` makes records of the running sandboxes",
		i.store.keys.identity(), own.Instance)
}

func (i *identity) undecided(running map[string]int) error {
	total := 0
	for _, n := range running {
		total += n
	}
	return undecidable("key %s is missing, but %d sandboxes run under the name %q (%s): nothing is created, ended or stopped until you decide whose they are. If they belong to another Bivouac instance, choose another -instance, or run `bivouac operator forget`. If Consul lost the data of this one, restore it, or run `bivouac operator adopt -instance=ID`",
		i.store.keys.identity(), total, i.config.Instance, counts(running))
}

// counts formats the numbers by instance, such as "a: 2, b: 1".
func counts(running map[string]int) string {
	var parts []string
	for _, instance := range slices.Sorted(maps.Keys(running)) {
		parts = append(parts, fmt.Sprintf("%s: %d", instance, running[instance]))
	}
	return strings.Join(parts, ", ")
}

func (i *identity) set(change func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	change()
	i.changed.Broadcast()
}

// fail records why the identity is not known. A known identity stays known while the
// key cannot be read.
func (i *identity) fail(why error, read bool) {
	i.set(func() {
		if read || i.own.Instance == "" {
			i.index, i.why = 0, why
		}
	})
}

// await waits until done returns true or an error, within a limit. It calls done with
// mu held.
func (i *identity) await(ctx context.Context, done func() (bool, error)) error {
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var err error
	if i.changed.Wait(limited, func() (ok bool) {
		ok, err = done()
		return ok || err != nil
	}) == nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return undecidable("the identity (key %s) is not known yet", i.store.keys.identity())
}

// stands returns nil if the identity is known and Consul has it. It waits for that
// within a limit.
func (i *identity) stands(ctx context.Context) error {
	return i.await(ctx, func() (bool, error) { return i.index != 0, i.why })
}

// moved returns nil once the identity is known to have another index than the one at
// which a transaction did not find it.
func (i *identity) moved(ctx context.Context, index uint64) error {
	i.look()
	return i.await(ctx, func() (bool, error) { return i.index != 0 && i.index != index, i.why })
}

// written returns nil once run has read the identity that this replica wrote.
func (i *identity) written(ctx context.Context) error {
	i.look()
	return i.await(ctx, func() (bool, error) { return i.index != 0, nil })
}

// confirm returns nil if Consul has the identity now. Then what a read before did not
// find is not missing because Consul lost all its data.
func (i *identity) confirm(ctx context.Context) error {
	op := i.unmoved()
	_, err := i.store.retryTxn(ctx, op)
	if moved, ok := errors.AsType[*movedError](err); ok {
		return i.moved(ctx, moved.index)
	}
	return err
}

// unmoved returns the operation that makes a transaction fail unless Consul has the
// identity that this replica knows.
func (i *identity) unmoved() *api.KVTxnOp {
	i.mu.Lock()
	defer i.mu.Unlock()
	return &api.KVTxnOp{Verb: api.KVCheckIndex, Key: i.store.keys.identity(), Index: i.index}
}

// trouble returns why the identity is not known, or nil if it is or soon will be.
func (i *identity) trouble() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.why
}

// known returns the identity of this replica, and whether Consul has it.
func (i *identity) known() (own Identity, stands bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.own, i.index != 0
}

// Identity returns the store's identity. It waits until that is known, or until ctx
// ends. The identity never changes after that.
func (s *Store) Identity(ctx context.Context) (own Identity, err error) {
	err = s.identity.changed.Wait(ctx, func() bool {
		own = s.identity.own
		return own.Instance != ""
	})
	return own, err
}

// Instance returns the instance ID, empty while it is not known.
func (s *Store) Instance() string {
	own, _ := s.identity.known()
	return own.Instance
}
