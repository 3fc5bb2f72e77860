package node

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"golang.org/x/sys/unix"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/runtime"
)

// namespaced are the drivers whose sandboxes have a mount namespace.
var namespaced = []string{nodeapi.Docker, nodeapi.Exec}

const sessionPath = nodeapi.SessionDir + "/" + nodeapi.SessionFile

// mustBeUnbound checks that a sandbox has neither a volume nor a session file.
func (s *sandbox) mustBeUnbound() {
	s.t.Helper()
	must.StrContains(s.t, s.ask("read", "/workspace/name"), "no such file")
	must.StrContains(s.t, s.ask("read", sessionPath), "no such file")
}

// mustBeBound checks that a sandbox has what an order says.
func (s *sandbox) mustBeBound(order nodeapi.Order) {
	s.t.Helper()
	must.Eq(s.t, order.VolumeHostPath, s.ask("read", "/workspace/name"))
	var session map[string]string
	must.NoError(s.t, json.Unmarshal([]byte(s.ask("read", sessionPath)), &session))
	must.Eq(s.t, map[string]string{"session_id": order.SessionID, "chat_id": order.ChatID, "agent_id": order.AgentID}, session)
}

func TestBind(t *testing.T) {
	for _, driver := range namespaced {
		t.Run(driver, func(t *testing.T) {
			t.Run("mounts the volume and the session file, restricted", func(t *testing.T) {
				b := newBench(t)
				s := b.newSandbox(driver)
				order := b.bindOrder(s)
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				s.mustBeBound(order)
				must.Eq(t, "", s.ask("write", "/workspace/new", "text"))
				text, err := os.ReadFile(filepath.Join(order.VolumeHostPath, "new"))
				must.NoError(t, err)
				must.Eq(t, "text", string(text))
				must.StrContains(t, s.ask("write", sessionPath, "text"), "read-only file system")
				flags := func(name string) int {
					f, err := strconv.Atoi(s.ask("flags", name))
					must.NoError(t, err)
					return f
				}
				const volume = unix.ST_NOSUID | unix.ST_NODEV
				const session = volume | unix.ST_NOEXEC | unix.ST_RDONLY
				must.Eq(t, volume, flags("/workspace")&volume)
				must.Eq(t, session, flags(nodeapi.SessionDir)&session)
			})

			t.Run("succeeds again with the same order, and changes nothing", func(t *testing.T) {
				b := newBench(t)
				s := b.newSandbox(driver)
				order := b.bindOrder(s)
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				mounts := s.ownMounts()
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				b.restart()
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				must.Eq(t, mounts, s.ownMounts())
				s.mustBeBound(order)
			})

			t.Run("refuses another chat, volume or session, also after a restart", func(t *testing.T) {
				b := newBench(t)
				s := b.newSandbox(driver)
				order := b.bindOrder(s)
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				for _, restart := range []bool{false, true} {
					if restart {
						b.restart()
					}
					other := order
					other.ChatID = uuid.NewString()
					must.ErrorIs(t, b.client.Bind(t.Context(), b.address, other), runtime.ErrConflict)
					other = order
					other.VolumeHostPath = b.newVolume()
					must.ErrorIs(t, b.client.Bind(t.Context(), b.address, other), runtime.ErrConflict)
					must.ErrorIs(t, b.client.Look(t.Context(), b.address, s.order), runtime.ErrConflict)
				}
				s.mustBeBound(order)
			})

			t.Run("gives a sandbox to exactly one of two chats", func(t *testing.T) {
				b := newBench(t)
				for range 10 {
					s := b.newSandbox(driver)
					orders := []nodeapi.Order{b.bindOrder(s), b.bindOrder(s)}
					errs := make([]error, 8)
					var all sync.WaitGroup
					for i := range errs {
						all.Go(func() { errs[i] = b.client.Bind(t.Context(), b.address, orders[i%2]) })
					}
					all.Wait()
					winner := 0
					if errs[0] != nil {
						winner = 1
					}
					for i, err := range errs {
						if i%2 == winner {
							must.NoError(t, err)
						} else {
							must.ErrorIs(t, err, runtime.ErrConflict)
						}
					}
					s.mustBeBound(orders[winner])
					must.Len(t, 2, s.ownMounts())
				}
			})

			for _, step := range []string{"volume", "session", "end"} {
				t.Run("is finished by the same order if the helper is killed before the step "+step, func(t *testing.T) {
					b := newBench(t)
					s := b.newSandbox(driver)
					order := b.bindOrder(s)
					ended := b.killedHelper(step)
					must.ErrorIs(t, b.client.Bind(t.Context(), b.address, order), runtime.ErrUnavailable)
					ended()
					if step != "end" { // the session file is the last
						must.StrContains(t, s.ask("read", sessionPath), "no such file")
					}
					b.start()
					must.ErrorIs(t, b.client.Bind(t.Context(), b.address, b.bindOrder(s)), runtime.ErrConflict)
					must.NoError(t, b.client.Bind(t.Context(), b.address, order))
					s.mustBeBound(order)
					must.Len(t, 2, s.ownMounts())
				})
			}

			t.Run("shows what is mounted below the volume", func(t *testing.T) {
				b := newBench(t)
				s := b.newSandbox(driver)
				order := b.bindOrder(s)
				below := filepath.Join(order.VolumeHostPath, "below")
				must.NoError(t, os.Mkdir(below, 0o755))
				must.NoError(t, unix.Mount("below", below, "tmpfs", 0, ""))
				defer func() { must.NoError(t, unix.Unmount(below, 0)) }()
				must.NoError(t, os.WriteFile(filepath.Join(below, "file"), []byte("text"), 0o644))
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				must.Eq(t, "text", s.ask("read", "/workspace/below/file"))
			})

			t.Run("leaves no files, threads or handles open", func(t *testing.T) {
				b := newBench(t)
				s := b.newSandbox(driver)
				order := b.bindOrder(s)
				must.NoError(t, b.client.Bind(t.Context(), b.address, order)) // opens a connection
				files, threads := b.held()
				count := 100
				if driver == nodeapi.Docker {
					count = 1000
				}
				for range count {
					must.Eq(t, "", s.ask("unmount", "/workspace"))
					must.Eq(t, "", s.ask("unmount", nodeapi.SessionDir))
					must.NoError(t, os.Remove(filepath.Join(b.config.Records, order.AllocID+recordSuffix)))
					must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
					must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				}
				s.mustBeBound(order)
				filesAfter, threadsAfter := b.held()
				t.Logf("files %d, threads %d; after %d binds: files %d, threads %d", files, threads, count, filesAfter, threadsAfter)
				must.LessEq(t, files, filesAfter)
				// Go keeps a few threads more or less.
				must.LessEq(t, threads+20, threadsAfter)
			})
		})
	}
}

// held returns how many files and threads this process has.
func (b *bench) held() (files, threads int) {
	count := func(name string) int {
		entries, err := os.ReadDir(name)
		must.NoError(b.t, err)
		return len(entries)
	}
	return count("/proc/self/fd"), count("/proc/self/task")
}

// ownMounts returns the mounts that the helper made in a sandbox.
func (s *sandbox) ownMounts() []string {
	s.t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(s.pid) + "/mountinfo")
	must.NoError(s.t, err)
	var all []string
	for line := range strings.Lines(string(text)) {
		target := strings.Fields(line)[4]
		if target == "/workspace" || target == nodeapi.SessionDir && strings.Contains(line, " "+nodeapi.Service+" ") {
			all = append(all, line)
		}
	}
	return all
}

func TestBind_withCgroupsOfVersion2(t *testing.T) {
	b := newBench(t)
	b.useCgroups2()
	for _, driver := range []string{nodeapi.Docker, nodeapi.Exec, nodeapi.RawExec} {
		t.Run(driver, func(t *testing.T) {
			s := b.newSandbox(driver)
			order := b.bindOrder(s)
			must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
			must.NoError(t, b.client.Bind(t.Context(), b.address, order))
			must.ErrorIs(t, b.client.Bind(t.Context(), b.address, b.bindOrder(s)), runtime.ErrConflict)
			if driver == nodeapi.RawExec {
				must.FileExists(t, filepath.Join(b.config.Links, order.SessionID, nodeapi.Workspace, "name"))
			} else {
				s.mustBeBound(order)
			}
			sweeper := b.binder()
			sweeper.sweep(t.Context())
			all, err := b.client.Bound(t.Context(), b.address, "")
			must.NoError(t, err)
			must.Eq(t, []nodeapi.Order{order}, all.Orders)
			s.end()
			sweeper.sweep(t.Context())
			all, err = b.client.Bound(t.Context(), b.address, "")
			must.NoError(t, err)
			must.SliceEmpty(t, all.Orders)
		})
	}
}

func TestBind_rawExec(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.RawExec)
	order := b.bindOrder(s)
	folder := filepath.Join(b.config.Links, order.SessionID)
	must.NoError(t, b.client.Look(t.Context(), b.address, s.order))

	ended := b.killedHelper("link")
	must.ErrorIs(t, b.client.Bind(t.Context(), b.address, order), runtime.ErrUnavailable)
	ended()
	b.start()
	must.ErrorIs(t, b.client.Bind(t.Context(), b.address, b.bindOrder(s)), runtime.ErrConflict)
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))
	name, err := os.ReadFile(filepath.Join(folder, nodeapi.Workspace, "name"))
	must.NoError(t, err)
	must.Eq(t, order.VolumeHostPath, string(name))
	text, err := os.ReadFile(filepath.Join(folder, nodeapi.SessionFile))
	must.NoError(t, err)
	var session runtime.SessionFile
	must.NoError(t, json.Unmarshal(text, &session))
	must.Eq(t, sessionOf(order), session)

	t.Run("its folder stays while it runs, and goes with it; the volume stays", func(t *testing.T) {
		sweeper := b.binder()
		sweeper.sweep(t.Context())
		must.DirExists(t, folder)

		child := filepath.Join(s.group, "of-the-sandbox")
		must.NoError(t, os.Mkdir(child, 0o755))
		s.moveTo(child)
		sweeper.sweep(t.Context())
		must.DirExists(t, folder)
		s.moveTo(s.group)
		must.NoError(t, os.Remove(child))

		s.end()
		sweeper.sweep(t.Context())
		must.DirNotExists(t, folder)
		must.FileExists(t, filepath.Join(order.VolumeHostPath, "name"))
		left, err := sweeper.records.allocations()
		must.NoError(t, err)
		must.Len(t, 0, left)
	})

	t.Run("what the sandbox put beside its volume stays, and nothing else", func(t *testing.T) {
		s := b.newSandbox(nodeapi.RawExec)
		order := b.bindOrder(s)
		must.NoError(t, b.client.Bind(t.Context(), b.address, order))
		folder := filepath.Join(b.config.Links, order.SessionID)
		must.NoError(t, os.WriteFile(filepath.Join(folder, "mine"), nil, 0o600))
		s.end()
		sweeper := b.binder()
		sweeper.sweep(t.Context())
		left, err := sweeper.records.allocations()
		must.NoError(t, err)
		must.Len(t, 0, left)
		entries, err := os.ReadDir(folder)
		must.NoError(t, err)
		must.Len(t, 1, entries)
		must.FileExists(t, filepath.Join(order.VolumeHostPath, "name"))
	})
}

// Each volume is refused, and nothing is written down: the sandbox can still be bound.
func TestBind_attackedWithVolumes(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.Docker)
	outside := t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(outside, "name"), []byte("secret"), 0o644))
	good := b.bindOrder(s)
	link := filepath.Join(b.root, "link")
	must.NoError(t, os.Symlink(outside, link))
	must.NoError(t, os.Mkdir(filepath.Join(outside, "below"), 0o755))
	inward := filepath.Join(b.root, "inward")
	must.NoError(t, os.Symlink(good.VolumeHostPath, inward))
	magic := filepath.Join(b.root, "magic")
	must.NoError(t, os.Symlink("/proc/self/root", magic))
	file := filepath.Join(good.VolumeHostPath, "name")
	for name, volume := range map[string]string{
		"symbolic link out of the root":    link,
		"folder behind a symbolic link":    link + "/below",
		"symbolic link to another volume":  inward,
		"symbolic link to the node's root": magic,
		"folder behind a magic link":       magic + "/etc",
		"parent folder":                    b.root + "/../" + filepath.Base(outside),
		"parent folder at the end":         b.root + "/x/..",
		"folder outside of the roots":      outside,
		"root itself":                      b.root,
		"root with a slash":                b.root + "/",
		"name that begins as the root":     b.root + "2",
		"node's root":                      "/",
		"nothing":                          "",
		"relative path":                    "chats/x",
		"file":                             file,
		"missing folder":                   b.root + "/missing",
		"NUL byte":                         b.root + "/a\x00b",
	} {
		t.Run(name, func(t *testing.T) {
			order := good
			order.VolumeHostPath = volume
			err := b.client.Bind(t.Context(), b.address, order)
			t.Log(err)
			must.ErrorIs(t, err, runtime.ErrInvalid)
			s.mustBeUnbound()
		})
	}
	must.NoError(t, b.client.Bind(t.Context(), b.address, good))
	s.mustBeBound(good)
}

// A folder of the path is replaced by a symbolic link and back, as fast as can be.
func TestBind_attackedWithARace(t *testing.T) {
	b := newBench(t)
	outside := t.TempDir()
	must.NoError(t, os.Mkdir(filepath.Join(outside, "below"), 0o755))
	must.NoError(t, os.WriteFile(filepath.Join(outside, "below", "name"), []byte("secret"), 0o644))
	parent, spare := filepath.Join(b.root, "parent"), filepath.Join(b.root, "spare")
	volume := filepath.Join(parent, "below")
	must.NoError(t, os.MkdirAll(volume, 0o755))
	must.NoError(t, os.WriteFile(filepath.Join(volume, "name"), []byte(volume), 0o644))
	must.NoError(t, os.Symlink(outside, spare))
	ctx, cancel := context.WithCancel(t.Context())
	var racer sync.WaitGroup
	racer.Go(func() {
		for ctx.Err() == nil {
			_ = unix.Renameat2(unix.AT_FDCWD, parent, unix.AT_FDCWD, spare, unix.RENAME_EXCHANGE) // tries until the end
		}
	})
	defer racer.Wait()
	defer cancel()
	bound, refused := 0, 0
	s := b.newSandbox(nodeapi.Docker)
	for range 300 {
		order := b.bindOrder(s)
		order.VolumeHostPath = volume
		err := b.client.Bind(t.Context(), b.address, order)
		if err != nil {
			must.True(t, errors.Is(err, runtime.ErrInvalid) || errors.Is(err, runtime.ErrUnavailable), must.Sprint(err))
			refused++
			continue
		}
		bound++
		must.Eq(t, volume, s.ask("read", "/workspace/name"))
		must.Eq(t, "", s.ask("unmount", "/workspace"))
		must.NoError(t, os.Remove(filepath.Join(b.config.Records, order.AllocID+recordSuffix)))
	}
	t.Logf("%d bound, %d refused, 0 outside of the root", bound, refused)
}

func TestBind_attackedBySandbox(t *testing.T) {
	for name, attack := range map[string]func(s, victim *sandbox){
		"a symbolic link at the target": func(s, _ *sandbox) {
			s.ask("rename", "/workspace", "/moved")
			must.Eq(s.t, "", s.ask("symlink", "/run", "/workspace"))
		},
		"a symbolic link out of its root": func(s, victim *sandbox) {
			s.ask("rename", "/workspace", "/moved")
			must.Eq(s.t, "", s.ask("symlink", "/proc/"+strconv.Itoa(victim.pid)+"/root/workspace", "/workspace"))
		},
		"a file at the target": func(s, _ *sandbox) {
			s.ask("rename", "/workspace", "/moved")
			must.Eq(s.t, "", s.ask("write", "/workspace", "text"))
		},
		"no target": func(s, _ *sandbox) {
			must.Eq(s.t, "", s.ask("rename", "/workspace", "/moved"))
		},
		"a symbolic link at the folder of the session": func(s, _ *sandbox) {
			must.Eq(s.t, "", s.ask("unmount", nodeapi.SessionDir))
			must.Eq(s.t, "", s.ask("rename", nodeapi.SessionDir, "/run/moved"))
			must.Eq(s.t, "", s.ask("symlink", "/workspace", nodeapi.SessionDir))
		},
		"a shared mount": func(s, _ *sandbox) {
			must.Eq(s.t, "", s.ask("share", "/"))
		},
	} {
		t.Run(name+" keeps only that sandbox from being bound", func(t *testing.T) {
			for _, driver := range namespaced {
				b := newBench(t)
				s, victim := b.newSandbox(driver), b.newSandbox(driver)
				attack(s, victim)
				for what, err := range map[string]error{
					"look": b.client.Look(t.Context(), b.address, s.order),
					"bind": b.client.Bind(t.Context(), b.address, b.bindOrder(s)),
				} {
					t.Log(driver, what, err)
					must.ErrorIs(t, err, runtime.ErrInvalid)
				}
				victim.mustBeUnbound()
				order := b.bindOrder(victim)
				must.NoError(t, b.client.Bind(t.Context(), b.address, order))
				victim.mustBeBound(order)
			}
		})
	}

	t.Run("a session file of its own does not matter", func(t *testing.T) {
		b := newBench(t)
		s := b.newSandbox(nodeapi.Docker)
		must.Eq(t, "", s.ask("unmount", nodeapi.SessionDir))
		must.Eq(t, "", s.ask("write", sessionPath, "{}"))
		order := b.bindOrder(s)
		must.NoError(t, b.client.Bind(t.Context(), b.address, order))
		s.mustBeBound(order)
	})

	t.Run("without a folder for the session file it gets one", func(t *testing.T) {
		b := newBench(t)
		s := b.newSandbox(nodeapi.Exec)
		must.Eq(t, "", s.ask("unmount", nodeapi.SessionDir))
		must.Eq(t, "", s.ask("rename", "/run", "/moved"))
		order := b.bindOrder(s)
		must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
		must.NoError(t, b.client.Bind(t.Context(), b.address, order))
		s.mustBeBound(order)
	})
}

// The process that Docker or the list of a cgroup names may be another one by now. Its
// environment may say what it likes.
func TestHelperDoesNotTrustTheEnvironment(t *testing.T) {
	b := newBench(t)
	victim := b.newSandbox(nodeapi.Docker)
	liar := b.newSandbox(nodeapi.Docker, "NOMAD_ALLOC_ID="+victim.order.AllocID, "BIVOUAC_SESSION_ID="+victim.order.SessionID, "NOMAD_TASK_NAME=sandbox")
	right := victim.pid
	victim.pid = liar.pid // as Docker says now
	for what, err := range map[string]error{
		"look": b.client.Look(t.Context(), b.address, victim.order),
		"bind": b.client.Bind(t.Context(), b.address, b.bindOrder(victim)),
	} {
		t.Log(what, err)
		must.ErrorIs(t, err, runtime.ErrNotFound)
	}
	liar.mustBeUnbound()
	victim.mustBeUnbound()

	victim.pid = right
	order := b.bindOrder(victim)
	must.NoError(t, b.client.Bind(t.Context(), b.address, order))
	victim.mustBeBound(order)
	liar.mustBeUnbound()
}

func TestBind_afterTheProcessIDWasUsedAgain(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.Docker)
	must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
	asked := b.docker.asked
	s.end()
	var other *sandbox
	for range 200 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(s.pid-1)), 0); err != nil && os.Getenv("CI") == "" {
			t.Skip("cannot choose the ID of a process: ", err)
		}
		other = b.newSandbox(nodeapi.Docker)
		if other.pid == s.pid {
			break
		}
		other.end()
	}
	must.Eq(t, s.pid, other.pid, must.Sprint("the ID was not used again"))
	err := b.client.Bind(t.Context(), b.address, b.bindOrder(s)) // by the handle of the look
	t.Log("remembered: ", err)
	must.ErrorIs(t, err, runtime.ErrNotFound)
	must.Eq(t, asked, b.docker.asked)
	err = b.client.Bind(t.Context(), b.address, b.bindOrder(s)) // Docker still names the ID
	t.Log("asked again: ", err)
	must.ErrorIs(t, err, runtime.ErrNotFound)
	other.mustBeUnbound()
}

func TestBind_refusesTheNodeItself(t *testing.T) {
	b := newBench(t)
	s := b.newSandbox(nodeapi.Docker)
	cgroup := cgroupFor(t, cgroupRoot, strings.Repeat("ab", 32))
	s.id, s.pid = strings.Repeat("ab", 32), os.Getpid() // a process of the node, in the right cgroup
	own, err := os.ReadFile("/proc/self/cgroup")
	must.NoError(t, err)
	must.NoError(t, os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0))
	defer leaveCgroup(t, string(own))
	err = b.client.Bind(t.Context(), b.address, b.bindOrder(s))
	t.Log(err)
	must.ErrorIs(t, err, runtime.ErrInvalid)
	must.ErrorContains(t, err, "no mount namespace of its own")
}

// leaveCgroup moves this process back to where /proc/self/cgroup said it was.
func leaveCgroup(t *testing.T, own string) {
	folder := filepath.Join(cgroupRoot, "freezer")
	if _, err := os.Stat(folder); err != nil {
		folder = cgroupRoot
	}
	for line := range strings.Lines(own) {
		if _, cgroup, ok := strings.Cut(strings.TrimSpace(line), ":freezer:"); ok {
			folder = filepath.Join(cgroupRoot, "freezer", cgroup)
		} else if cgroup, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok && folder == cgroupRoot {
			folder = filepath.Join(cgroupRoot, cgroup)
		}
	}
	must.NoError(t, os.WriteFile(filepath.Join(folder, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0))
}

func TestLook(t *testing.T) {
	t.Run("lets a bind do without Docker", func(t *testing.T) {
		b := newBench(t)
		s := b.newSandbox(nodeapi.Docker)
		must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
		must.Eq(t, 1, b.docker.asked)
		must.NoError(t, b.client.Bind(t.Context(), b.address, b.bindOrder(s)))
		must.Eq(t, 1, b.docker.asked)
	})
	t.Run("need not have been, and a restart forgets it", func(t *testing.T) {
		b := newBench(t)
		s := b.newSandbox(nodeapi.Docker)
		must.NoError(t, b.client.Look(t.Context(), b.address, s.order))
		b.restart()
		order := b.bindOrder(s)
		must.NoError(t, b.client.Bind(t.Context(), b.address, order))
		must.Eq(t, 2, b.docker.asked)
		s.mustBeBound(order)
	})
	t.Run("does not find what does not run here", func(t *testing.T) {
		b := newBench(t)
		for _, driver := range []string{nodeapi.Docker, nodeapi.Exec, nodeapi.RawExec} {
			s := b.newSandbox(driver)
			order := s.order
			order.AllocID = uuid.NewString()
			must.ErrorIs(t, b.client.Look(t.Context(), b.address, order), runtime.ErrNotFound)
			s.end()
			must.ErrorIs(t, b.client.Look(t.Context(), b.address, s.order), runtime.ErrNotFound)
		}
	})
	t.Run("does not find the container of another session", func(t *testing.T) {
		b := newBench(t)
		s := b.newSandbox(nodeapi.Docker)
		order := s.order
		order.SessionID = uuid.NewString()
		must.ErrorIs(t, b.client.Look(t.Context(), b.address, order), runtime.ErrNotFound)
	})
	t.Run("is forgotten when the sandbox has ended", func(t *testing.T) {
		b := newBench(t)
		s := b.newSandbox(nodeapi.Docker)
		looker := b.binder()
		must.NoError(t, looker.look(t.Context(), s.order))
		looker.sweep(t.Context())
		must.MapLen(t, 1, looker.spares)
		s.end()
		looker.sweep(t.Context())
		must.MapLen(t, 0, looker.spares)
	})
}

// BenchmarkBind measures one bind of a sandbox that was looked for, through HTTPS.
func BenchmarkBind(b *testing.B) {
	bench := newBench(b)
	s := bench.newSandbox(nodeapi.Docker)
	bench.measureBinds(b, bench.bindOrder(s), func() {
		must.Eq(b, "", s.ask("unmount", "/workspace"))
		must.Eq(b, "", s.ask("unmount", nodeapi.SessionDir))
	})
}

// measureBinds measures binds of one sandbox that was looked for. After each, undo removes
// what it has mounted.
func (b *bench) measureBinds(m *testing.B, order nodeapi.Order, undo func()) {
	var took []time.Duration
	for m.Loop() {
		m.StopTimer()
		must.NoError(m, b.client.Look(m.Context(), b.address, keyOf(order)))
		m.StartTimer()
		started := time.Now()
		must.NoError(m, b.client.Bind(m.Context(), b.address, order))
		took = append(took, time.Since(started))
		m.StopTimer()
		undo()
		must.NoError(m, os.Remove(filepath.Join(b.config.Records, order.AllocID+recordSuffix)))
		m.StartTimer()
	}
	slices.Sort(took)
	m.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	m.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
