package node

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/runtime"
)

// patience is how long these tests wait for Nomad. It is long because the machine may be
// busy.
const patience = 2 * time.Minute

// TestBind_inNomad binds sandboxes that a real Nomad runs, and then lets Nomad remove all
// of them. The files of the volume must stay.
func TestBind_inNomad(t *testing.T) {
	needRoot(t)
	stack.NeedServers(t)
	stack.NeedShell(t)
	n := stack.NomadForTest(t)
	must.NoError(t, stack.AddTools(n.ExecDir))
	client, err := n.Client()
	must.NoError(t, err)

	for _, driver := range []string{nodeapi.Docker, nodeapi.Exec, nodeapi.RawExec} {
		t.Run(driver, func(t *testing.T) {
			var b *bench
			config, target := map[string]any{"command": "/usr/local/bin/sleep", "args": []string{"1000000"}}, "/alloc/data"
			switch driver {
			case nodeapi.Docker:
				var image string
				b, image = newDockerBench(t)
				target = "/workspace"
				config = map[string]any{
					"image": image, "command": "/bin/busybox", "args": []string{"sleep", "1000000"}, "network_mode": "none",
					"cap_drop": []string{"all"}, "security_opt": []string{"no-new-privileges"}, "readonly_rootfs": true,
					"mount": []map[string]any{
						{"type": "tmpfs", "target": "/workspace"},
						{"type": "tmpfs", "target": nodeapi.SessionDir, "readonly": true},
					},
				}
			case nodeapi.RawExec:
				config["command"] = "/bin/sleep"
				b = newBench(t)
			default:
				b = newBench(t)
			}
			order := nodeapi.Order{SessionID: uuid.NewString(), Task: "sandbox", TaskDriver: driver, Target: target}
			if driver == nodeapi.RawExec {
				order.Target = filepath.Join(nodeapi.SandboxesDir, order.SessionID, nodeapi.Workspace)
			}
			order.AllocID = runTask(t, client, order, config)
			must.NoError(t, b.client.Look(t.Context(), b.address, order))
			look := order
			order.ChatID, order.AgentID, order.VolumeHostPath = uuid.NewString(), "agent", b.newVolume()
			must.NoError(t, b.client.Bind(t.Context(), b.address, order))
			b.restart()
			must.NoError(t, b.client.Bind(t.Context(), b.address, order))

			// As the processes of the sandbox see it.
			session := filepath.Join(nodeapi.SessionDir, nodeapi.SessionFile)
			root := ""
			if driver == nodeapi.RawExec {
				target = filepath.Join(b.config.Links, order.SessionID, nodeapi.Workspace)
				session = filepath.Join(b.config.Links, order.SessionID, nodeapi.SessionFile)
			} else {
				p, err := b.binder().find(t.Context(), look)
				must.NoError(t, err)
				defer p.Close() //nolint:errcheck // it was only read from
				root = fmt.Sprintf("/proc/self/fd/%d/root", p.folder.Fd())
			}
			name, err := os.ReadFile(filepath.Join(root, target, "name"))
			must.NoError(t, err)
			must.Eq(t, order.VolumeHostPath, string(name))
			text, err := os.ReadFile(filepath.Join(root, session))
			must.NoError(t, err)
			var got runtime.SessionFile
			must.NoError(t, json.Unmarshal(text, &got))
			must.Eq(t, sessionOf(order), got)

			must.SliceNotEmpty(t, allocationFolders(t, order.AllocID))
			_, _, err = client.Jobs().Deregister(order.SessionID, true, nil)
			must.NoError(t, err)
			awaitRemoved(t, client, order.AllocID)
			must.FileExists(t, filepath.Join(order.VolumeHostPath, "name"))
			sweeper := b.binder()
			sweeper.sweep(t.Context())
			left, err := sweeper.records.allocations()
			must.NoError(t, err)
			must.Len(t, 0, left)
		})
	}
}

// runTask runs a job with the task of an order, and returns its allocation once it runs.
func runTask(t *testing.T, client *api.Client, order nodeapi.Order, config map[string]any) (allocID string) {
	t.Helper()
	task := api.NewTask(order.Task, order.TaskDriver)
	task.Config = config
	task.Env = map[string]string{"BIVOUAC_SESSION_ID": order.SessionID}
	task.Resources = &api.Resources{CPU: new(20), MemoryMB: new(32)}
	job := api.NewBatchJob(order.SessionID, order.SessionID, "global", 50).AddDatacenter("*").
		AddTaskGroup(api.NewTaskGroup("sandbox", 1).AddTask(task))
	_, _, err := client.Jobs().Register(job, nil)
	must.NoError(t, err)
	t.Cleanup(func() { _, _, _ = client.Jobs().Deregister(order.SessionID, true, nil) }) // gone already
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.Gap(50*time.Millisecond), wait.ErrorFunc(func() error {
		allocs, _, err := client.Jobs().Allocations(order.SessionID, true, nil)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(allocs, func(a *api.AllocationListStub) bool { return a.ClientStatus == api.AllocClientStatusRunning })
		if i < 0 {
			return fmt.Errorf("no allocation of %d runs", len(allocs))
		}
		allocID = allocs[i].ID
		return nil
	})))
	return allocID
}

// awaitRemoved waits until the Nomad client has removed the folder of an allocation.
func awaitRemoved(t *testing.T, client *api.Client, allocID string) {
	t.Helper()
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.Gap(100*time.Millisecond), wait.ErrorFunc(func() error {
		alloc, _, err := client.Allocations().Info(allocID, nil)
		if err == nil && !alloc.ClientTerminalStatus() {
			return fmt.Errorf("the allocation is %s", alloc.ClientStatus)
		}
		_ = client.Allocations().GC(&api.Allocation{ID: allocID}, nil) // it may be gone
		if left := allocationFolders(t, allocID); len(left) > 0 {
			return fmt.Errorf("%s is there", left)
		}
		return nil
	})))
}

// allocationFolders returns the folders of an allocation below those where this package's
// Nomad may keep them.
func allocationFolders(t *testing.T, allocID string) []string {
	t.Helper()
	var all []string
	text, err := os.ReadFile("/proc/self/mountinfo")
	must.NoError(t, err)
	for line := range strings.Lines(string(text)) {
		if target := strings.Fields(line)[4]; strings.Contains(target, allocID) {
			all = append(all, strconv.Quote(target))
		}
	}
	found, err := filepath.Glob(filepath.Join(os.TempDir(), "*", "*", "alloc", allocID))
	must.NoError(t, err)
	return append(all, found...)
}
