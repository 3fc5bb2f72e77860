package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

const (
	cgroupRoot    = "/sys/fs/cgroup"
	recordsFolder = "/run/bivouac-node"
	// sweepEvery is how often a binder looks for sandboxes that have ended.
	sweepEvery = 30 * time.Second
	// maxSpares is how many sandboxes a binder remembers at a time. Each costs a file
	// descriptor. Those beyond are found again at their bind.
	maxSpares = 10_000
)

// binder carries out orders on this node.
type binder struct {
	roots   []string // of volumes
	docker  *dockerEngine
	cgroups string
	records *records
	links   links
	log     hclog.Logger
	// reached is called before each change in a sandbox, for tests. It may be nil.
	reached func(step string)

	turns turns

	mu     sync.Mutex
	spares map[nodeapi.Order]*process // by what they were looked for; not bound yet
}

func newBinder(roots []string, log hclog.Logger) (*binder, error) {
	written, err := newRecords(recordsFolder)
	if err != nil {
		return nil, err
	}
	return &binder{
		roots: roots, docker: newDockerEngine(dockerSocket), cgroups: cgroupRoot,
		records: written, links: links{nodeapi.SandboxesDir}, log: log,
		spares: make(map[nodeapi.Order]*process),
	}, nil
}

// look implements sandboxes.
func (b *binder) look(ctx context.Context, order nodeapi.Order) error {
	leave, err := b.turns.take(ctx, order.AllocID)
	if err != nil {
		return err
	}
	defer leave()
	accepted, err := b.records.get(order.AllocID)
	if err == nil {
		return fmt.Errorf("%w: the sandbox was given to chat %s", runtime.ErrConflict, accepted.ChatID)
	}
	if !errors.Is(err, runtime.ErrNotFound) {
		return err
	}
	p, err := b.find(ctx, order)
	if err != nil {
		return err
	}
	if err := b.check(p, order); err != nil {
		return errors.Join(err, p.Close())
	}
	return b.remember(order, p)
}

// bound implements sandboxes.
func (b *binder) bound(ctx context.Context, known string) (nodeapi.Bound, error) {
	bound, err := b.records.bound(ctx, known)
	if err != nil && bound.Version != "" { // one bad file must not hide all others
		b.log.Error("orders_unreadable", "error", err)
		err = nil
	}
	return bound, err
}

// check checks that a bind would find all that it needs in a sandbox.
func (b *binder) check(p *process, order nodeapi.Order) error {
	if order.TaskDriver == nodeapi.RawExec {
		return b.links.prepare()
	}
	ns, err := p.namespace()
	if err != nil {
		return err
	}
	spots, err := openPlaces(p, order.Target)
	return errors.Join(err, spots.Close(), ns.Close())
}

// bind implements sandboxes.
func (b *binder) bind(ctx context.Context, order nodeapi.Order) error {
	volume, err := openVolume(b.roots, order.VolumeHostPath)
	if err != nil {
		return err
	}
	defer volume.Close() //nolint:errcheck // it was only used to clone its mount
	leave, err := b.turns.take(ctx, order.AllocID)
	if err != nil {
		return err
	}
	defer leave()
	p, err := b.spare(ctx, order)
	if err != nil {
		return err
	}
	defer p.Close() //nolint:errcheck // it was only read from
	if order.TaskDriver == nodeapi.RawExec {
		return b.link(order)
	}
	return b.mount(p, volume, order)
}

// link makes the folder of a sandbox that sees the files of the node.
func (b *binder) link(order nodeapi.Order) error {
	if err := b.links.prepare(); err != nil {
		return err
	}
	if err := b.records.accept(order); err != nil {
		return err
	}
	b.reach("link")
	return b.links.make(order)
}

// mount mounts the volume and then the session file in a sandbox, each unless it is there.
// The session file is the last, because a program that sees it looks at its volume next.
// The order is written down when nothing is left that could be wrong with it.
func (b *binder) mount(p *process, volume *os.File, order nodeapi.Order) (err error) {
	ns, err := p.namespace()
	if err != nil {
		return err
	}
	defer ns.Close() //nolint:errcheck // it was only entered
	spots, err := openPlaces(p, order.Target)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, spots.Close()) }()
	tree, err := cloneMount(volume)
	if err != nil {
		return err
	}
	defer tree.Close() //nolint:errcheck // it is mounted by now, or it goes
	session, err := newSessionMount(sessionOf(order))
	if err != nil {
		return err
	}
	defer session.Close() //nolint:errcheck // as with tree
	bound, err := sameFolder(spots.target, volume)
	if err != nil {
		return err
	}
	told, err := hasSession(spots.session)
	if err != nil {
		return err
	}
	if err := b.records.accept(order); err != nil {
		return err
	}
	return inNamespace(ns, func() error {
		if !bound {
			b.reach("volume")
			if err := moveMount(tree, spots.target); err != nil {
				return err
			}
		}
		if !told {
			b.reach("session")
			if err := moveMount(session, spots.session); err != nil {
				return err
			}
		}
		b.reach("end")
		return nil
	})
}

func sameFolder(a, b *os.File) (bool, error) {
	infoA, err := a.Stat()
	if err != nil {
		return false, unavailable("compare folders", err)
	}
	infoB, err := b.Stat()
	if err != nil {
		return false, unavailable("compare folders", err)
	}
	return os.SameFile(infoA, infoB), nil
}

func (b *binder) reach(step string) {
	if b.reached != nil {
		b.reached(step)
	}
}

// spare returns the process of a sandbox. If it was looked for before, that needs no
// question to Docker.
func (b *binder) spare(ctx context.Context, order nodeapi.Order) (*process, error) {
	key := keyOf(order)
	b.mu.Lock()
	p := b.spares[key]
	delete(b.spares, key)
	b.mu.Unlock()
	if p == nil {
		return b.find(ctx, order)
	}
	if err := p.belongs(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (b *binder) remember(order nodeapi.Order, p *process) error {
	key := keyOf(order)
	b.mu.Lock()
	defer b.mu.Unlock()
	earlier := b.spares[key]
	if earlier == nil && len(b.spares) >= maxSpares {
		return p.Close()
	}
	b.spares[key] = p
	if earlier != nil {
		return earlier.Close()
	}
	return nil
}

// keyOf returns the part of an order that says which sandbox it is about.
func keyOf(order nodeapi.Order) nodeapi.Order {
	order.ChatID, order.AgentID, order.VolumeHostPath, order.Note = "", "", "", ""
	return order
}

// find finds the first process of a sandbox.
func (b *binder) find(ctx context.Context, order nodeapi.Order) (*process, error) {
	if order.TaskDriver == nodeapi.Docker {
		id, pid, err := b.docker.container(ctx, order)
		if err != nil {
			return nil, err
		}
		return openProcess(pid, id, "docker-"+id+".scope")
	}
	folders, names := cgroupFolders(b.cgroups, order.AllocID, order.Task)
	pids, err := processesIn(folders)
	if err != nil {
		return nil, err
	}
	var first *process
	var firstStarted uint64
	for _, pid := range pids {
		p, err := openProcess(pid, names...)
		if errors.Is(err, runtime.ErrNotFound) { // it has ended meanwhile
			continue
		}
		if err != nil {
			return nil, errors.Join(err, closeIf(first))
		}
		started, err := b.candidate(p, order)
		switch {
		case errors.Is(err, runtime.ErrNotFound), errors.Is(err, runtime.ErrInvalid):
			_ = p.Close() // it was only read from
		case err != nil:
			return nil, errors.Join(err, p.Close(), closeIf(first))
		case first == nil || started < firstStarted:
			_ = closeIf(first) // as above
			first, firstStarted = p, started
		default:
			_ = p.Close() // as above
		}
	}
	if first == nil {
		return nil, fmt.Errorf("%w: Nomad's cgroup %s has no process of a sandbox", runtime.ErrNotFound, names[0])
	}
	return first, nil
}

// candidate returns when a process of a sandbox began. The first one is the sandbox
// itself, and others may be in mount namespaces that the sandbox made. It refuses processes
// of the node itself: for a moment Nomad's own program is in the cgroup that it makes.
func (b *binder) candidate(p *process, order nodeapi.Order) (started uint64, err error) {
	if order.TaskDriver == nodeapi.Exec {
		ns, err := p.namespace()
		if err != nil {
			return 0, err
		}
		_ = ns.Close() // it was only compared
	}
	return p.started()
}

func closeIf(p *process) error {
	if p == nil {
		return nil
	}
	return p.Close()
}

// run sweeps until ctx ends.
func (b *binder) run(ctx context.Context) {
	for backoff.Sleep(ctx, sweepEvery) == nil {
		b.sweep(ctx)
	}
}

// sweep forgets sandboxes that have ended.
func (b *binder) sweep(ctx context.Context) {
	b.mu.Lock()
	for key, p := range b.spares {
		if p.belongs() != nil {
			delete(b.spares, key)
			_ = p.Close() // it was only read from
		}
	}
	b.mu.Unlock()
	allocations, err := b.records.allocations()
	if err != nil {
		b.log.Error("sweep_failed", "error", err)
	}
	for _, id := range allocations {
		if err := b.sweepOne(ctx, id); err != nil {
			b.log.Warn("sweep_failed", "alloc_id", id, "error", err)
		}
	}
}

func (b *binder) sweepOne(ctx context.Context, allocID string) error {
	leave, busy := b.turns.try(allocID)
	if busy != nil {
		return nil
	}
	defer leave()
	order, err := b.records.get(allocID)
	if err != nil {
		return err
	}
	p, err := b.find(ctx, order)
	if err == nil {
		return p.Close()
	}
	if !errors.Is(err, runtime.ErrNotFound) {
		return err
	}
	if order.TaskDriver != nodeapi.Docker {
		// Its processes may all be in cgroups that the sandbox made below Nomad's.
		if folders, _ := cgroupFolders(b.cgroups, allocID, order.Task); anyExists(folders) {
			return nil
		}
	}
	// What a sandbox of root has put into the folder stays until the node is rebooted. The
	// record goes nevertheless, so that this is tried once.
	if err := b.links.remove(order.SessionID); err != nil {
		b.log.Warn("folder_left", "session_id", order.SessionID, "alloc_id", allocID, "error", err)
	}
	b.log.Info("sandbox_ended", "session_id", order.SessionID, "alloc_id", allocID)
	return b.records.remove(allocID)
}

// close forgets all sandboxes.
func (b *binder) close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for key, p := range b.spares {
		errs = append(errs, p.Close())
		delete(b.spares, key)
	}
	return errors.Join(errs...)
}
