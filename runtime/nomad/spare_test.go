package nomad_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/stack"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// linkHelper does what a node helper does for raw_exec, in this process. A real helper
// is elsewhere, at the address that Nomad tells.
type linkHelper struct {
	address string

	mu      sync.Mutex
	looks   int
	bound   map[string]nodeapi.Order
	changed broadcast.Cond // bound
}

func newLinkHelper(address string) *linkHelper {
	h := &linkHelper{address: address, bound: map[string]nodeapi.Order{}}
	h.changed.L = &h.mu
	return h
}

func (h *linkHelper) Look(_ context.Context, address string, _ nodeapi.Order) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.looks++
	return h.mustBe(address)
}

func (h *linkHelper) Bind(_ context.Context, address string, order nodeapi.Order) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if bound, ok := h.bound[order.SessionID]; ok && bound != order {
		return fmt.Errorf("%w: given to chat %s", runtime.ErrConflict, bound.ChatID)
	}
	folder := filepath.Dir(order.Target)
	session := fmt.Sprintf(`{"session_id":%q,"chat_id":%q,"agent_id":%q}`+"\n", order.SessionID, order.ChatID, order.AgentID)
	err := os.MkdirAll(folder, 0o755)
	if link := os.Symlink(order.VolumeHostPath, order.Target); err == nil && !errors.Is(link, os.ErrExist) {
		err = link
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(folder, "session.json"), []byte(session), 0o644)
	}
	h.bound[order.SessionID] = order
	h.changed.Broadcast()
	return errors.Join(err, h.mustBe(address))
}

func (h *linkHelper) Bound(ctx context.Context, address, known string) (bound nodeapi.Bound, err error) {
	ctx, cancel := context.WithTimeout(ctx, nodeapi.BoundWait)
	defer cancel()
	_ = h.changed.Wait(ctx, func() bool {
		bound = nodeapi.Bound{Version: strconv.Itoa(len(h.bound)), Orders: slices.Collect(maps.Values(h.bound))}
		return bound.Version != known
	})
	return bound, h.mustBe(address)
}

func (h *linkHelper) mustBe(address string) error {
	if address != h.address {
		return fmt.Errorf("%w: there is no helper at %s", runtime.ErrUnavailable, address)
	}
	return nil
}

// helperNamespace makes a namespace for the job of the helpers.
func helperNamespace(t *testing.T, client *api.Client) string {
	t.Helper()
	namespace := "helpers-" + uuid.NewString()
	_, err := client.Namespaces().Register(&api.Namespace{Name: namespace}, nil)
	must.NoError(t, err)
	t.Cleanup(func() {
		must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.ErrorFunc(func() error {
			_, err := client.Namespaces().Delete(namespace, nil) // not while a job ends there
			return err
		})))
	})
	return namespace
}

// runHelpers runs a system job that registers the service of node helpers, and returns
// the service's address on the only node.
func runHelpers(t *testing.T, client *api.Client, namespace string) string {
	t.Helper()
	task := api.NewTask("node", "raw_exec").SetConfig("command", "sleep").SetConfig("args", []string{"3600"})
	task.Resources = &api.Resources{CPU: new(1), MemoryMB: new(10)}
	group := api.NewTaskGroup("node", 1).AddTask(task)
	group.Networks = []*api.NetworkResource{{DynamicPorts: []api.Port{{Label: "https"}}}}
	group.Services = []*api.Service{{Name: nodeapi.Service, PortLabel: "https", Provider: "nomad"}}
	job := &api.Job{
		ID: new("bivouac-node"), Name: new("bivouac-node"), Type: new(api.JobTypeSystem),
		Namespace: new(namespace), Datacenters: []string{"*"}, TaskGroups: []*api.TaskGroup{group},
	}
	inNamespace := &api.QueryOptions{Namespace: namespace}
	_, _, err := client.Jobs().Register(job, &api.WriteOptions{Namespace: namespace})
	must.NoError(t, err)
	t.Cleanup(func() {
		_, _, err := client.Jobs().Deregister(*job.ID, true, &api.WriteOptions{Namespace: namespace})
		must.NoError(t, err)
	})
	address := ""
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.BoolFunc(func() bool {
		services, _, err := client.Services().Get(nodeapi.Service, inNamespace)
		if err != nil || len(services) != 1 {
			return false
		}
		address = net.JoinHostPort(services[0].Address, strconv.Itoa(services[0].Port))
		return true
	})), must.Sprint("the service of the helpers is registered"))
	return address
}

// openWithHelper starts a replica that can have spares.
func openWithHelper(t *testing.T, client *api.Client, template *jobs.Template, instance string, helper nomad.Helper, namespace string) replica {
	t.Helper()
	driver, err := nomad.New(nomad.Config{
		Client: client, Template: template, Helper: helper, HelperNamespace: namespace, Logger: testLogger(t),
	})
	must.NoError(t, err)
	driver.SetInstance(instance, "")
	run(t, driver)
	return replica{driver, client, template, instance}
}

// ofSpares returns the raw_exec template with runSpare as the command.
func ofSpares(t *testing.T) *jobs.Template {
	t.Helper()
	return rawExec(t, map[string]string{"args": `["spare-sandbox"]`, "ready_path": "/"})
}

// newSpare returns the spec of a spare. Its sandbox, and what linkHelper makes for it, are
// removed after the test.
func newSpare(t *testing.T, r replica) runtime.Spec {
	t.Helper()
	spec := newSpec(t, r)
	t.Cleanup(func() { must.NoError(t, os.RemoveAll(filepath.Join("/run/bivouac/sandboxes", spec.SessionID))) })
	spec.Pool, spec.ChatID, spec.AgentID, spec.VolumeHostPath = "small", "", "", ""
	return spec
}

// forChat returns the spec with which a chat claims a spare.
func forChat(t *testing.T, spare runtime.Spec) runtime.Spec {
	t.Helper()
	spare.Pool, spare.ChatID, spare.AgentID, spare.VolumeHostPath = "", uuid.NewString(), "agent-1", t.TempDir()
	must.NoError(t, os.WriteFile(filepath.Join(spare.VolumeHostPath, "notes"), []byte("of "+spare.ChatID), 0o644))
	return spare
}

// claimed returns what the spare tells at /claimed.
func claimed(t *testing.T, sandbox runtime.Sandbox) (status int, text string) {
	t.Helper()
	req, err := http.NewRequestWithContext(patiently(t), http.MethodGet, "http://"+sandbox.Endpoint.AddrPort().String()+"/claimed", nil)
	must.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	must.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must.NoError(t, err)
	return resp.StatusCode, string(body)
}

func inList(t *testing.T, r replica, sessionID string) runtime.Sandbox {
	t.Helper()
	for sandbox, err := range r.List(patiently(t)) {
		must.NoError(t, err)
		if sandbox.SessionID == sessionID {
			return sandbox
		}
	}
	t.Fatalf("%s is not listed", sessionID)
	return runtime.Sandbox{}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("the folder of claimed sandboxes is root's")
	}
}

// TestSpare_on_raw_exec follows a spare through its life on a real Nomad.
func TestSpare_on_raw_exec(t *testing.T) {
	t.Parallel()
	needRoot(t)
	client, err := stack.NomadForTest(t).Client()
	must.NoError(t, err)
	namespace := helperNamespace(t, client)
	helper := newLinkHelper("")
	r := openWithHelper(t, client, ofSpares(t), "test-"+uuid.NewString(), helper, namespace)

	_, err = r.Create(patiently(t), newSpare(t, r), ignore)
	must.ErrorIs(t, err, runtime.ErrNotPlaced)
	must.ErrorContains(t, err, "runs no helper (bivouac node)")

	helper.address = runHelpers(t, client, namespace)
	spare := newSpare(t, r)
	var made runtime.Sandbox
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.ErrorFunc(func() (err error) {
		made, err = r.Create(patiently(t), spare, ignore) // once the replica knows of the helper
		if errors.Is(err, runtime.ErrNotPlaced) {
			return err
		}
		must.NoError(t, err)
		return nil
	})))
	must.Eq(t, "small", made.Pool)
	must.Eq(t, runtime.StateRunning, made.State)
	must.Eq(t, 1, helper.looks)
	status, _ := claimed(t, made)
	must.Eq(t, http.StatusNotFound, status)
	found, err := r.Inspect(patiently(t), spare.SessionID)
	must.NoError(t, err)
	must.Eq(t, made, found)
	must.Eq(t, made, inList(t, r, spare.SessionID))

	spec := forChat(t, spare)
	began := time.Now()
	got, err := r.Claim(patiently(t), spec)
	t.Logf("claimed in %v", time.Since(began))
	must.NoError(t, err)
	want := made
	want.ChatID, want.AgentID, want.VolumeHostPath = spec.ChatID, spec.AgentID, spec.VolumeHostPath
	want.CreatedAt, want.ExpiresAt = spec.CreatedAt, spec.ExpiresAt
	must.Eq(t, want, got)
	status, text := claimed(t, got)
	must.Eq(t, http.StatusOK, status)
	must.Eq(t, fmt.Sprintf(`{"session_id":%q,"chat_id":%q,"agent_id":"agent-1"}`+"\nof "+spec.ChatID, spec.SessionID, spec.ChatID), text)

	again, err := r.Claim(patiently(t), spec)
	must.NoError(t, err)
	must.Eq(t, want, again)
	_, err = r.Claim(patiently(t), forChat(t, spare))
	must.ErrorIs(t, err, runtime.ErrConflict)
	must.Eq(t, want, inList(t, r, spare.SessionID))

	// Another replica has not seen the claim, and gets the same answers.
	other := openWithHelper(t, client, ofSpares(t), r.instance, helper, namespace)
	again, err = other.Claim(patiently(t), spec)
	must.NoError(t, err)
	must.Eq(t, want, again)

	// One that follows nothing has to ask the helper.
	third, err := nomad.New(nomad.Config{
		Client: client, Template: r.template, Instance: r.instance, Helper: helper, HelperNamespace: namespace, Logger: testLogger(t),
	})
	must.NoError(t, err)
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.ErrorFunc(func() error { // until Nomad has reported the start
		all, err := third.FindChat(patiently(t), spec.ChatID, "")
		must.NoError(t, err)
		if !reflect.DeepEqual([]runtime.Sandbox{want}, all) {
			return fmt.Errorf("got %+v", all)
		}
		return nil
	})))

	must.NoError(t, r.Stop(patiently(t), spare.SessionID))
	_, err = r.Claim(patiently(t), spec)
	must.ErrorIs(t, err, runtime.ErrConflict)
	must.NoError(t, r.Delete(patiently(t), spare.SessionID))
	_, err = r.Claim(patiently(t), spec)
	must.ErrorIs(t, err, runtime.ErrNotFound)
	_, err = r.Create(patiently(t), spare, ignore)
	must.ErrorIs(t, err, runtime.ErrConflict)
}

// TestClaim_of_a_spare_that_died kills a spare. It is not claimed, neither before nor
// after Nomad has noticed.
func TestClaim_of_a_spare_that_died(t *testing.T) {
	t.Parallel()
	needRoot(t)
	client, err := stack.NomadForTest(t).Client()
	must.NoError(t, err)
	namespace := helperNamespace(t, client)
	helper := newLinkHelper(runHelpers(t, client, namespace))
	r := openWithHelper(t, client, ofSpares(t), "test-"+uuid.NewString(), helper, namespace)
	reports := watch(t, r)
	spare := newSpare(t, r)
	made, err := r.Create(patiently(t), spare, ignore)
	must.NoError(t, err)
	alloc, _, err := client.Allocations().Info(made.ContainerID, nil)
	must.NoError(t, err)
	must.NoError(t, client.Allocations().Signal(alloc, nil, "sandbox", "SIGKILL"))
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.BoolFunc(func() bool { return !answers(made.Endpoint) })))
	spec := forChat(t, spare) // the helper may bind it nevertheless
	_, err = r.Claim(patiently(t), spec)
	t.Log(err)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	awaitReport(t, reports, spare.SessionID, runtime.StateDead)
	_, err = r.Claim(patiently(t), spec)
	t.Log(err)
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "it is dead")
}

// TestSpare_on_a_node_that_is_drained shows that Nomad lets a spare run on while its node
// is drained, that it is not claimed then, and that Inspect tells when Nomad ends it.
func TestSpare_on_a_node_that_is_drained(t *testing.T) {
	t.Parallel()
	needRoot(t)
	stack.NeedServers(t)
	n, err := stack.StartNomad(patiently(t), stack.NomadConfig{Drivers: []string{"raw_exec"}})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, n.Stop()) })
	client, err := n.Client()
	must.NoError(t, err)
	helper := newLinkHelper(runHelpers(t, client, api.DefaultNamespace))
	r := openWithHelper(t, client, ofSpares(t), "test-"+uuid.NewString(), helper, "")
	reports := watch(t, r)
	spare := newSpare(t, r)
	made, err := r.Create(patiently(t), spare, ignore)
	must.NoError(t, err)
	alloc, _, err := client.Allocations().Info(made.ContainerID, nil)
	must.NoError(t, err)
	drain := func(deadline time.Duration) {
		t.Helper()
		_, err := client.Nodes().UpdateDrain(alloc.NodeID, &api.DrainSpec{Deadline: deadline, IgnoreSystemJobs: true}, false, nil)
		must.NoError(t, err)
	}

	drain(time.Hour)
	must.Wait(t, wait.InitialSuccess(wait.Timeout(patience), wait.ErrorFunc(func() error { // Inspect reads the node now and then
		now, err := r.Inspect(patiently(t), spare.SessionID)
		must.NoError(t, err)
		must.Eq(t, runtime.StateRunning, now.State)
		if !strings.HasSuffix(now.Reason, " takes no new sandboxes: it is being drained") {
			return fmt.Errorf("reason %q", now.Reason)
		}
		return nil
	})))
	_, err = r.Claim(patiently(t), forChat(t, spare))
	must.ErrorIs(t, err, runtime.ErrNotReady)
	must.ErrorContains(t, err, "being drained")

	drain(-1) // at once
	dead := awaitReport(t, reports, spare.SessionID, runtime.StateDead)
	t.Log(dead.Reason)
	_, err = r.Claim(patiently(t), forChat(t, spare))
	t.Log(err)
	must.True(t, isAny(err, runtime.ErrNotReady, runtime.ErrConflict)) // the latter once the driver has stopped the job, too
}
