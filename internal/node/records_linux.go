package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

// records has a file for each allocation that an order was accepted for, with the order. It
// is the truth about who has a sandbox: no sandbox can reach it, it outlives the helper,
// and like the sandboxes it does not outlive the machine's boot.
type records struct {
	folder string
	start  string // random, so that the versions of another helper are others

	mu      sync.Mutex
	changes int            // of what the folder contains
	changed broadcast.Cond // changes
}

const recordSuffix = ".json"

// newRecords makes the folder if it does not exist. Only root may write to it.
func newRecords(folder string) (*records, error) {
	if err := os.Mkdir(folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the folder of orders: %w", err)
	}
	if err := onlyRootWrites(folder); err != nil {
		return nil, err
	}
	r := &records{folder: folder, start: uuid.NewString()}
	r.changed.L = &r.mu
	return r, nil
}

// note records that the folder has changed.
func (r *records) note() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes++
	r.changed.Broadcast()
}

// version says what the folder contains. The caller holds mu.
func (r *records) version() string { return fmt.Sprintf("%s-%d", r.start, r.changes) }

// bound returns all orders that were accepted, and what could not be read. If they are as in
// the known version, it waits until ctx ends and returns none.
func (r *records) bound(ctx context.Context, known string) (bound nodeapi.Bound, err error) {
	bound.Orders = []nodeapi.Order{}
	look := func() bool {
		bound.Version = r.version() // before the orders: what changes meanwhile is another version
		return bound.Version != known
	}
	if r.changed.Wait(ctx, look) != nil {
		return bound, nil //nolint:nilerr // that nothing has changed is an answer
	}
	all, err := r.allocations()
	if err != nil {
		return nodeapi.Bound{}, unavailable("read the accepted orders", err)
	}
	var errs []error
	for _, id := range all {
		switch order, err := r.get(id); {
		case err == nil:
			bound.Orders = append(bound.Orders, order)
		case !errors.Is(err, runtime.ErrNotFound): // otherwise it was removed meanwhile
			errs = append(errs, err)
		}
	}
	return bound, errors.Join(errs...)
}

// accept writes an order down. It returns [runtime.ErrConflict] if another order was
// accepted for the sandbox. The note of an order makes it no other.
func (r *records) accept(order nodeapi.Order) error {
	path := filepath.Join(r.folder, order.AllocID+recordSuffix)
	text, err := json.Marshal(order)
	if err != nil {
		return fmt.Errorf("%w: %w", runtime.ErrInvalid, err)
	}
	if err := writeOnce(path, text); err == nil || !errors.Is(err, fs.ErrExist) {
		r.note()
		return unavailable("write the order down", err)
	}
	accepted, err := r.get(order.AllocID)
	if err != nil {
		return err
	}
	accepted.Note, order.Note = "", ""
	if accepted != order {
		return fmt.Errorf("%w: the sandbox was given to chat %s as session %s with volume %s",
			runtime.ErrConflict, accepted.ChatID, accepted.SessionID, accepted.VolumeHostPath)
	}
	return nil
}

// get returns the order that was accepted for a sandbox, or [runtime.ErrNotFound].
func (r *records) get(allocID string) (nodeapi.Order, error) {
	var order nodeapi.Order
	text, err := os.ReadFile(filepath.Join(r.folder, allocID+recordSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return order, fmt.Errorf("%w: no order was accepted for allocation %s", runtime.ErrNotFound, allocID)
	}
	if err == nil {
		err = json.Unmarshal(text, &order)
	}
	return order, unavailable("read the accepted order", err)
}

// remove forgets a sandbox that has ended.
func (r *records) remove(allocID string) error {
	defer r.note()
	return os.Remove(filepath.Join(r.folder, allocID+recordSuffix))
}

// allocations returns the allocation IDs of all accepted orders.
func (r *records) allocations() ([]string, error) {
	entries, err := os.ReadDir(r.folder)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, entry := range entries {
		if id, ok := strings.CutSuffix(entry.Name(), recordSuffix); ok {
			all = append(all, id)
		}
	}
	return all, nil
}

// writeOnce makes a file with its content in one step, or returns [fs.ErrExist] if there is
// one. A file without a name is gone if this process is killed.
func writeOnce(path string, text []byte) (err error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), path)
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.Write(text); err != nil {
		return err
	}
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
}

// onlyRootWrites checks that nobody else can replace what is in a folder.
func onlyRootWrites(folder string) error {
	for dir := folder; ; dir = filepath.Dir(dir) {
		var stat unix.Stat_t
		if err := unix.Lstat(dir, &stat); err != nil {
			return fmt.Errorf("look at %s: %w", dir, err)
		}
		othersWrite := stat.Mode&0o022 != 0
		if dir != folder && stat.Mode&unix.S_ISVTX != 0 {
			othersWrite = false // they cannot replace what belongs to root
		}
		if stat.Mode&unix.S_IFMT != unix.S_IFDIR || stat.Uid != 0 || othersWrite {
			return fmt.Errorf("%s must be a folder of root that nobody else can write to", dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// unavailable wraps err, if there is one, as [runtime.ErrUnavailable].
func unavailable(doing string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s: %w", runtime.ErrUnavailable, doing, err)
}
