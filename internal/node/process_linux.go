package node

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/runtime"
)

// firstNamespace is the mount namespace of the machine's first process.
const firstNamespace = "/proc/1/ns/mnt"

// process is a handle of a process: its folder in /proc, opened. If the process ends, and
// its ID is used again, the folder still belongs to the process that ended, and reading
// from it fails.
type process struct {
	folder *os.File
	names  []string // of its cgroup; see belongs
}

// openProcess opens the process with an ID if it is in a cgroup of one of the names. It
// returns [runtime.ErrNotFound] if it is not, because the ID may belong to another process
// by now.
func openProcess(pid int, names ...string) (*process, error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: process %d: %w", notFoundIf(err, unix.ENOENT), pid, err)
	}
	p := &process{os.NewFile(uintptr(fd), "process"), names}
	if err := p.belongs(); err != nil { // safeguard: helper does not trust the environment of a process
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Close closes the handle. The process goes on.
func (p *process) Close() error { return p.folder.Close() }

// belongs returns [runtime.ErrNotFound] unless the process runs in its cgroup. Only root
// can move a process into a cgroup, so this is what Docker and Nomad say about it. What a
// process says about itself, such as its environment, proves nothing.
func (p *process) belongs() error {
	text, err := p.read("cgroup")
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		// A line has the form ID:CONTROLLERS:PATH.
		_, rest, _ := strings.Cut(line, ":")
		_, cgroup, _ := strings.Cut(rest, ":")
		for part := range strings.SplitSeq(strings.TrimSpace(cgroup), "/") {
			if slices.Contains(p.names, part) {
				return nil
			}
		}
	}
	return fmt.Errorf("%w: the process is in no cgroup %s", runtime.ErrNotFound, strings.Join(p.names, " or "))
}

// open opens a file of the process. It returns [runtime.ErrNotFound] if the process has
// ended.
func (p *process) open(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(p.folder.Fd()), name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %s of the process: %w", notFoundIf(err, unix.ESRCH, unix.ENOENT), name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// read returns the content of a file of the process, as open does.
func (p *process) read(name string) (string, error) {
	f, err := p.open(name, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // it was only read from
	text, err := io.ReadAll(f)
	if err != nil {
		return "", fmt.Errorf("%w: read %s of the process: %w", notFoundIf(err, unix.ESRCH), name, err)
	}
	return string(text), nil
}

// notFoundIf returns the error that err means for a sandbox: [runtime.ErrNotFound] if it is
// one of gone, else [runtime.ErrUnavailable].
func notFoundIf(err error, gone ...error) error {
	for _, g := range gone {
		if errors.Is(err, g) {
			return runtime.ErrNotFound
		}
	}
	return runtime.ErrUnavailable
}

// namespace opens the mount namespace of the process. It refuses that of the node itself.
func (p *process) namespace() (*os.File, error) {
	ns, err := p.open("ns/mnt", unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	for _, own := range []string{"/proc/self/ns/mnt", firstNamespace} {
		same, err := sameNamespace(ns, own)
		if own == firstNamespace && errors.Is(err, fs.ErrPermission) {
			continue // the helper's root is not the machine's, and could not enter it either
		}
		if err == nil && same {
			err = fmt.Errorf("%w: the process has no mount namespace of its own", runtime.ErrInvalid)
		}
		if err != nil {
			return nil, errors.Join(err, ns.Close())
		}
	}
	return ns, nil
}

func sameNamespace(ns *os.File, name string) (bool, error) {
	a, err := ns.Stat()
	if err != nil {
		return false, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	b, err := os.Stat(name)
	if err != nil {
		return false, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	return os.SameFile(a, b), nil
}

// sharedMounts returns the IDs of the mounts in the namespace of the process from which
// new mounts would spread to other namespaces, such as that of the node.
func (p *process) sharedMounts() (map[uint64]bool, error) {
	text, err := p.read("mountinfo")
	if err != nil {
		return nil, err
	}
	shared := make(map[uint64]bool)
	for line := range strings.Lines(text) {
		// ID PARENT DEVICE ROOT TARGET OPTIONS [FIELD...] - TYPE SOURCE OPTIONS
		fields := strings.Fields(line)
		if len(fields) < 7 {
			return nil, fmt.Errorf("%w: mountinfo has the line %q", runtime.ErrUnavailable, line)
		}
		id, err := strconv.ParseUint(fields[0], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%w: mountinfo: %w", runtime.ErrUnavailable, err)
		}
		for _, field := range fields[6:] {
			if field == "-" {
				break
			}
			if strings.HasPrefix(field, "shared:") {
				shared[id] = true
			}
		}
	}
	return shared, nil
}

// started returns when the process began, in ticks since the machine did.
func (p *process) started() (uint64, error) {
	text, err := p.read("stat")
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, which may contain anything.
	i := bytes.LastIndexByte([]byte(text), ')')
	const startTime = 22 - 3 // its field, less those up to the name
	fields := strings.Fields(text[i+1:])
	if i < 0 || len(fields) <= startTime {
		return 0, fmt.Errorf("%w: unexpected content of stat", runtime.ErrUnavailable)
	}
	return strconv.ParseUint(fields[startTime], 10, 64)
}

// cgroupFolders returns where Nomad makes the cgroup of a task of exec or raw_exec, and the
// names of that cgroup: with version 1 of cgroups, and with version 2 without and with cores
// of its own.
func cgroupFolders(root, allocID, task string) (folders, names []string) {
	name := allocID + "." + task
	scope := name + ".scope"
	return []string{
		path.Join(root, "freezer/nomad", name),
		path.Join(root, "nomad.slice/share.slice", scope),
		path.Join(root, "nomad.slice/reserve.slice", scope),
	}, []string{name, scope}
}

// anyExists reports whether one of the folders exists, or may exist.
func anyExists(folders []string) bool {
	return slices.ContainsFunc(folders, func(folder string) bool {
		_, err := os.Stat(folder)
		return !errors.Is(err, os.ErrNotExist)
	})
}

// processesIn returns the IDs of the processes in the first cgroup that exists.
func processesIn(folders []string) ([]int, error) {
	for _, folder := range folders {
		text, err := os.ReadFile(path.Join(folder, "cgroup.procs"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) { // ENODEV: it is being removed
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
		}
		var all []int
		for field := range strings.FieldsSeq(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%w: cgroup.procs: %w", runtime.ErrUnavailable, err)
			}
			if pid > 0 { // 0: a process outside of this PID namespace
				all = append(all, pid)
			}
		}
		return all, nil
	}
	return nil, fmt.Errorf("%w: Nomad has no cgroup %s", runtime.ErrNotFound, path.Base(folders[0]))
}
