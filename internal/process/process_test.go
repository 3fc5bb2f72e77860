package process

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/conformance"
)

// openDriver runs the given command, or a demo sandbox where there is none.
func openDriver(t *testing.T, dir string, command ...string) *Driver {
	if len(command) == 0 {
		command = []string{os.Args[0]}
	}
	d, err := New(Config{Dir: dir, Command: command, Logger: hclog.NewNullLogger()})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, d.Close()) })
	return d
}

func newSpec(t *testing.T, d *Driver) runtime.Spec {
	spec := runtime.Spec{SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "agent-1", VolumeHostPath: t.TempDir()}
	t.Cleanup(func() { must.NoError(t, d.Delete(context.Background(), spec.SessionID)) })
	return spec
}

func ignore(runtime.Stage) {}

func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Open: func(context.Context) (runtime.Driver, error) { return openDriver(t, t.TempDir()), nil },
		Kill: func(_ context.Context, sandbox runtime.Sandbox) error {
			pid, err := strconv.Atoi(sandbox.ContainerID)
			if err != nil {
				return err
			}
			return syscall.Kill(pid, syscall.SIGKILL)
		},
		Leftovers: func(_ context.Context, sessionID string) ([]string, error) { return processesOf(sessionID), nil },
		Failing: func(context.Context) (runtime.Driver, error) {
			return openDriver(t, t.TempDir(), "/bin/false"), nil
		},
		Slow: func(context.Context) (runtime.Driver, error) {
			return openDriver(t, t.TempDir(), "/bin/sleep", "1000"), nil
		},
		Foreign: func(context.Context) (runtime.Driver, error) { return openDriver(t, t.TempDir()), nil },
		Demo:    true,
	})
}

// processesOf finds the processes that bear a session ID, wherever they are.
func processesOf(sessionID string) []string {
	var found []string
	environs, _ := filepath.Glob("/proc/[0-9]*/environ") // the pattern is well formed
	for _, path := range environs {
		environ, err := os.ReadFile(path)
		if err == nil && bytes.Contains(environ, []byte("BIVOUAC_SESSION_ID="+sessionID)) {
			found = append(found, path)
		}
	}
	return found
}

func TestCreateTellsWhyASandboxEnded(t *testing.T) {
	for _, test := range []struct {
		name, script string
		want         string // in the error
		reason       string // in what Inspect tells
	}{
		{"it exits", "echo no such thing >&2; exit 3", "exit code 3: no such thing", "exit code 3"},
		{"it exits well but early", "exit 0", "exit code 0", "exit code 0"},
		{"it is killed", "kill -9 $$", "killed by signal 9", "killed by signal 9"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := openDriver(t, t.TempDir(), "/bin/sh", "-c", test.script)
			spec := newSpec(t, d)
			_, err := d.Create(t.Context(), spec, ignore)
			must.ErrorIs(t, err, runtime.ErrNotReady)
			must.ErrorContains(t, err, test.want)
			sandbox, err := d.Inspect(t.Context(), spec.SessionID)
			must.NoError(t, err)
			must.Eq(t, runtime.StateDead, sandbox.State)
			must.Eq(t, test.reason, sandbox.Reason)
		})
	}
}

func TestCreateOfACommandThatIsMissing(t *testing.T) {
	d := openDriver(t, t.TempDir(), "/no/such/program")
	_, err := d.Create(t.Context(), newSpec(t, d), ignore)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "/no/such/program")
}

func TestCreateRefusesWhatCannotWork(t *testing.T) {
	d := openDriver(t, t.TempDir())
	file := filepath.Join(t.TempDir(), "file")
	must.NoError(t, os.WriteFile(file, nil, 0o600))
	for name, spoil := range map[string]func(*runtime.Spec){
		"no UUID":              func(s *runtime.Spec) { s.SessionID = "../" + s.SessionID },
		"a relative volume":    func(s *runtime.Spec) { s.VolumeHostPath = "here" },
		"a volume not there":   func(s *runtime.Spec) { s.VolumeHostPath += "/missing" },
		"a file as the volume": func(s *runtime.Spec) { s.VolumeHostPath = file },
	} {
		t.Run(name, func(t *testing.T) {
			spec := newSpec(t, d)
			spoil(&spec)
			_, err := d.Create(t.Context(), spec, ignore)
			must.ErrorIs(t, err, runtime.ErrInvalid)
		})
	}
}

func TestStopEndsTheWholeGroup(t *testing.T) {
	// Given a sandbox that ignores SIGTERM, as does a child of it.
	d := openDriver(t, t.TempDir(), "/bin/sh", "-c", `trap "" TERM; sleep 600 & exec `+os.Args[0])
	d.grace = 50 * time.Millisecond
	spec := newSpec(t, d)
	_, err := d.Create(t.Context(), spec, ignore)
	must.NoError(t, err)
	must.Len(t, 2, processesOf(spec.SessionID))

	must.NoError(t, d.Stop(t.Context(), spec.SessionID))
	must.SliceEmpty(t, processesOf(spec.SessionID))
}

func TestProcessesThatLeftTheGroup(t *testing.T) {
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skip("this system does not show what a process was given")
	}
	for name, script := range map[string]string{
		"one in a session of its own":                     `setsid sleep 600 & `,
		"one that its parent has left behind":             `(setsid sleep 600 &) ; `,
		"one that has cleared its environment":            `env -i setsid sleep 600 & `,
		"one that ignores SIGTERM":                        `setsid sh -c 'trap "" TERM; while :; do sleep 600; done' & `,
		"the child of one, which cleared its environment": `setsid sh -c 'env -i sleep 600; :' & `,
	} {
		t.Run(name, func(t *testing.T) {
			for _, test := range []struct {
				name string
				end  func(*testing.T, *Driver, runtime.Sandbox)
			}{
				{"ends with a Stop", func(t *testing.T, d *Driver, s runtime.Sandbox) {
					must.NoError(t, d.Stop(t.Context(), s.SessionID))
				}},
				{"ends as a leftover", func(t *testing.T, d *Driver, s runtime.Sandbox) {
					must.NoError(t, EndLeftovers(t.Context(), d.dir))
				}},
				{"ends when the sandbox's first process does", func(t *testing.T, d *Driver, s runtime.Sandbox) {
					pid, err := strconv.Atoi(s.ContainerID)
					must.NoError(t, err)
					must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
					must.Wait(t, wait.InitialSuccess(wait.Gap(time.Millisecond), wait.Timeout(10*time.Second), wait.BoolFunc(func() bool {
						found, err := d.Inspect(t.Context(), s.SessionID)
						return err == nil && found.State == runtime.StateDead
					})))
				}},
			} {
				if strings.Contains(name, "cleared") && strings.Contains(test.name, "first process") {
					continue // nothing ties it to the sandbox any more once its parent has ended
				}
				t.Run(test.name, func(t *testing.T) {
					d := openDriver(t, t.TempDir(), "/bin/sh", "-c", script+" exec "+os.Args[0])
					d.grace = 50 * time.Millisecond
					spec := runtime.Spec{SessionID: uuid.NewString(), VolumeHostPath: t.TempDir()}
					made, err := d.Create(t.Context(), spec, ignore)
					must.NoError(t, err)
					pid, err := strconv.Atoi(made.ContainerID)
					must.NoError(t, err)
					before := awaitEscape(t, pid, mark(d.dir, spec.SessionID))

					test.end(t, d, made)
					for _, m := range before {
						now, runs := statOf(m.pid)
						must.False(t, runs && now.start == m.start, must.Sprint("process", m.pid, "still runs"))
					}
				})
			}
		})
	}
}

// awaitEscape waits until a process of the sandbox sleeps outside of its group,
// and returns all that the sandbox has.
func awaitEscape(t *testing.T, leader int, mark string) []member {
	t.Helper()
	var all []member
	must.Wait(t, wait.InitialSuccess(wait.Gap(time.Millisecond), wait.Timeout(10*time.Second), wait.BoolFunc(func() bool {
		all = members(leader, true, mark)
		return slices.ContainsFunc(all, func(m member) bool {
			s, runs := statOf(m.pid)
			name, err := os.ReadFile("/proc/" + strconv.Itoa(m.pid) + "/comm")
			return runs && err == nil && s.group != leader && strings.TrimSpace(string(name)) == "sleep"
		})
	})))
	return all
}

func TestChildrenEndWithTheLeader(t *testing.T) {
	d := openDriver(t, t.TempDir(), "/bin/sh", "-c", "sleep 600 & exit 4")
	spec := newSpec(t, d)
	_, err := d.Create(t.Context(), spec, ignore)
	must.ErrorContains(t, err, "exit code 4")
	must.SliceEmpty(t, processesOf(spec.SessionID))
}

// awaitState waits until the kernel shows a process in a state.
func awaitState(t *testing.T, pid int, state string) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Gap(time.Millisecond), wait.Timeout(10*time.Second), wait.BoolFunc(func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return err == nil && bytes.Contains(status, []byte("State:\t"+state))
	})))
}

func TestASandboxLivesWhileOneOfItsThreadsDoes(t *testing.T) {
	// Given a sandbox whose first thread has ended, so that the kernel calls the
	// process a zombie.
	d := openDriver(t, t.TempDir(), os.Args[0], endFirstThread)
	spec := runtime.Spec{SessionID: uuid.NewString(), VolumeHostPath: t.TempDir()}
	created, err := d.Create(t.Context(), spec, ignore)
	must.NoError(t, err)
	pid, err := strconv.Atoi(created.ContainerID)
	must.NoError(t, err)
	awaitState(t, pid, "Z (zombie)")

	// Then it is one that runs, and can be ended.
	found, err := d.Inspect(t.Context(), spec.SessionID)
	must.NoError(t, err)
	must.Eq(t, created, found)
	must.NoError(t, d.Delete(t.Context(), spec.SessionID))
	conn, err := net.Dial("tcp", created.Endpoint.AddrPort().String())
	must.ErrorIs(t, err, syscall.ECONNREFUSED)
	must.Nil(t, conn)
}

func TestSandboxesGetNoSecrets(t *testing.T) {
	t.Setenv("NOMAD_TOKEN", "secret")
	t.Setenv("CONSUL_HTTP_TOKEN", "secret")
	d := openDriver(t, t.TempDir(), "/bin/sh", "-c", "env; exit 1")
	spec := newSpec(t, d)
	_, err := d.Create(t.Context(), spec, ignore)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	output, err := os.ReadFile(filepath.Join(d.dir, logName(spec.SessionID, runtime.Stdout)))
	must.NoError(t, err)
	must.StrContains(t, string(output), "BIVOUAC_SESSION_ID="+spec.SessionID)
	must.StrNotContains(t, string(output), "secret")
}

func TestEndLeftovers(t *testing.T) {
	for _, stage := range []runtime.Stage{runtime.StagePlaced, runtime.StageStarted, runtime.StageReady} {
		t.Run("of a server that was killed when a sandbox was "+string(stage), func(t *testing.T) {
			dir, id := t.TempDir(), uuid.NewString()
			server := exec.Command(os.Args[0])
			server.Env = append(os.Environ(), "TEST_DIR="+dir, "TEST_SESSION_ID="+id, "TEST_STAGE="+string(stage))
			err := server.Run()
			must.ErrorContains(t, err, "signal: killed")

			must.NoError(t, EndLeftovers(t.Context(), dir))
			must.SliceEmpty(t, processesOf(id))
			must.SliceEmpty(t, files(t, dir, "*.json"))
		})
	}
	t.Run("of a folder that is not there", func(t *testing.T) {
		must.NoError(t, EndLeftovers(t.Context(), filepath.Join(t.TempDir(), "none")))
	})
	t.Run("leaves alone what ended by itself", func(t *testing.T) {
		d := openDriver(t, t.TempDir())
		spec := newSpec(t, d)
		_, err := d.Create(t.Context(), spec, ignore)
		must.NoError(t, err)
		must.Len(t, 1, files(t, d.dir, "*.json"))
		must.NoError(t, d.Delete(t.Context(), spec.SessionID))
		must.SliceEmpty(t, files(t, d.dir, "*"))
	})
	t.Run("names a damaged record", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, uuid.NewString()+recordExt)
		must.NoError(t, os.WriteFile(path, []byte("{"), 0o600))
		must.ErrorContains(t, EndLeftovers(t.Context(), dir), path)
	})
	t.Run("leaves another process with the same PID alone", func(t *testing.T) {
		foreign := exec.Command("/bin/sleep", "600")
		foreign.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		must.NoError(t, foreign.Start())
		t.Cleanup(func() {
			must.NoError(t, foreign.Process.Kill())
			must.Error(t, foreign.Wait())
		})
		dir, id := t.TempDir(), uuid.NewString()
		text, err := json.Marshal(leader{PID: foreign.Process.Pid, Start: "another boot/1"})
		must.NoError(t, err)
		must.NoError(t, os.WriteFile(filepath.Join(dir, id+recordExt), text, 0o600))

		must.NoError(t, EndLeftovers(t.Context(), dir))
		_, runs := startOf(foreign.Process.Pid)
		must.True(t, runs)
	})
}

func files(t *testing.T, dir, pattern string) []string {
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	must.NoError(t, err)
	return found
}

func TestNothingStartsWhosePIDIsNotRecorded(t *testing.T) {
	// Given a process behind its gate, and a server that dies before it opens it.
	d := openDriver(t, t.TempDir(), "/bin/sh", "-c", "echo started")
	sb := newSandbox(newSpec(t, d), 0)
	cmd, open, err := d.startGated(t.Context(), sb)
	must.NoError(t, err)
	must.NoError(t, open.Close())

	must.Error(t, cmd.Wait())
	output, err := os.ReadFile(filepath.Join(d.dir, logName(sb.spec.SessionID, runtime.Stdout)))
	must.NoError(t, err)
	must.Eq(t, "", string(output))
}

func TestAFolderThatOthersCanWriteToIsRefused(t *testing.T) {
	open := func(dir string) error {
		if err := EndLeftovers(t.Context(), dir); err != nil {
			return err
		}
		d, err := New(Config{Dir: dir, Command: []string{"true"}, Logger: hclog.NewNullLogger()})
		if err == nil {
			must.NoError(t, d.Close())
		}
		return err
	}
	for name, test := range map[string]struct {
		make func(t *testing.T, dir string)
		want string
	}{
		"one that anybody can write to":   {func(t *testing.T, dir string) { must.NoError(t, os.Chmod(dir, 0o777)) }, "others can write to"},
		"one that its group can write to": {func(t *testing.T, dir string) { must.NoError(t, os.Chmod(dir, 0o770)) }, "others can write to"},
		"a symbolic link": {func(t *testing.T, dir string) {
			must.NoError(t, os.RemoveAll(dir))
			must.NoError(t, os.Symlink(t.TempDir(), dir))
		}, "not a directory"},
		"one of another user": {func(t *testing.T, dir string) {
			if os.Geteuid() != 0 {
				t.Skip("only root can give a folder away")
			}
			must.NoError(t, os.Chown(dir, 65534, 65534))
		}, "belongs to another user"},
		"one with a record that anybody can write to": {func(t *testing.T, dir string) {
			record := filepath.Join(dir, uuid.NewString()+recordExt)
			must.NoError(t, os.WriteFile(record, []byte("{}"), 0o600))
			must.NoError(t, os.Chmod(record, 0o666))
		}, "others can write to"},
		"one with a record that is a symbolic link": {func(t *testing.T, dir string) {
			must.NoError(t, os.Symlink("/dev/null", filepath.Join(dir, uuid.NewString()+recordExt)))
		}, "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "sandboxes")
			must.NoError(t, os.Mkdir(dir, 0o700))
			must.NoError(t, open(dir))
			test.make(t, dir)
			must.ErrorContains(t, open(dir), test.want)
		})
	}
}

func TestAFolderKeepsItsFilesWhenItsPathIsTaken(t *testing.T) {
	// Given a driver whose folder somebody has replaced by a link to another one.
	dir, other := filepath.Join(t.TempDir(), "sandboxes"), t.TempDir()
	d := openDriver(t, dir)
	must.NoError(t, os.Rename(dir, dir+".moved"))
	must.NoError(t, os.Symlink(other, dir))

	// When it makes a sandbox, then nothing is written through the link.
	spec := newSpec(t, d)
	_, err := d.Create(t.Context(), spec, ignore)
	must.NoError(t, err)
	files, err := os.ReadDir(other)
	must.NoError(t, err)
	must.SliceEmpty(t, files)
}

func TestCreateFollowsNoLinkOutOfAVolumeRoot(t *testing.T) {
	// Given a root with a folder and links, which is itself reached by a link.
	target, outside := t.TempDir(), t.TempDir()
	root := filepath.Join(t.TempDir(), "root")
	must.NoError(t, os.Symlink(target, root))
	must.NoError(t, os.MkdirAll(filepath.Join(target, "own", "deep"), 0o700))
	for name, to := range map[string]string{"host": "/", "outside": outside, "self": target, "deeper": filepath.Join(target, "own", "deep")} {
		must.NoError(t, os.Symlink(to, filepath.Join(target, name)))
	}
	d, err := New(Config{Dir: t.TempDir(), Command: []string{os.Args[0]}, VolumeRoots: []string{root}, Logger: hclog.NewNullLogger()})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, d.Close()) })

	for name, allowed := range map[string]bool{"own": true, "host": false, "outside": false, "self": false, "deeper": false} {
		t.Run(name, func(t *testing.T) {
			spec := newSpec(t, d)
			spec.VolumeHostPath = filepath.Join(root, name)
			_, err := d.Create(t.Context(), spec, ignore)
			if allowed {
				must.NoError(t, err)
				return
			}
			must.ErrorIs(t, err, runtime.ErrInvalid)
			must.ErrorContains(t, err, "not directly below a volume root")
		})
	}
}

func TestIDsOfDeletedSandboxesAreForgottenAfterAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := openDriver(t, t.TempDir())
		spec := newSpec(t, d)
		must.NoError(t, d.Delete(t.Context(), spec.SessionID))

		time.Sleep(goneLife - time.Second)
		for _, err := range d.List(t.Context()) {
			must.NoError(t, err)
		}
		_, err := d.Create(t.Context(), spec, ignore)
		must.ErrorIs(t, err, runtime.ErrConflict)

		time.Sleep(time.Second)
		for _, err := range d.List(t.Context()) {
			must.NoError(t, err)
		}
		must.MapEmpty(t, d.gone)
	})
}
