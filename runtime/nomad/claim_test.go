package nomad

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/broadcast"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

const (
	spareID = "0c7a4f9e-6a53-4b4c-9f0c-3b2f5d1e8a77"
	chatID  = "5f0e3b0e-1f1b-4a43-8a0e-6a7c2f9f5f11"
)

// fakeHelper remembers its orders. A spare can be bound once.
type fakeHelper struct {
	refuse error // returned by Bind
	hang   bool  // Bind waits until its context ends

	mu      sync.Mutex
	orders  []string
	bound   map[string]nodeapi.Order
	changed broadcast.Cond // bound
	down    bool           // Bound fails
	asked   int            // calls of Bound
}

func newFakeHelper() *fakeHelper {
	h := &fakeHelper{bound: make(map[string]nodeapi.Order)}
	h.changed.L = &h.mu
	return h
}

// Bound says for the helpers of all nodes what the one at 10.0.0.1:4748 has bound.
func (h *fakeHelper) Bound(ctx context.Context, address, known string) (bound nodeapi.Bound, err error) {
	h.mu.Lock()
	h.asked++
	down := h.down
	h.mu.Unlock()
	if down {
		return nodeapi.Bound{}, runtime.ErrUnavailable
	}
	_ = h.changed.Wait(ctx, func() bool {
		bound = nodeapi.Bound{Version: strconv.Itoa(len(h.bound))}
		if address == "10.0.0.1:4748" {
			bound.Orders = slices.Collect(maps.Values(h.bound))
		}
		return bound.Version != known
	})
	return bound, nil
}

func (h *fakeHelper) Look(_ context.Context, address string, order nodeapi.Order) error {
	h.note("look", address, order)
	return nil
}

func (h *fakeHelper) Bind(ctx context.Context, address string, order nodeapi.Order) error {
	h.note("bind", address, order)
	if h.hang {
		<-ctx.Done()
		return ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if bound, ok := h.bound[order.SessionID]; ok && bound != order {
		return fmt.Errorf("%w: bound to chat %s", runtime.ErrConflict, bound.ChatID)
	}
	if h.refuse == nil {
		h.bound[order.SessionID] = order
		h.changed.Broadcast()
	}
	return h.refuse
}

func (h *fakeHelper) note(what, address string, order nodeapi.Order) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.orders = append(h.orders, fmt.Sprintf("%s at %s: %+v", what, address, order))
}

// world is a Nomad with one node that has a helper, and a spare that answers.
type world struct {
	*Driver
	client   *api.Client
	template *jobs.Template
	helper   *fakeHelper
	node     api.NodeListStub
	goneNode string // which Nomad does not know any more
	broken   bool   // Nomad does not tell of the spare
	helpers  []api.ServiceRegistration
	answer   string // of the spare
	job      jobFields
	spare    *api.AllocationListStub
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{helper: newFakeHelper(), answer: spareID, node: api.NodeListStub{Status: api.NodeStatusReady, SchedulingEligibility: api.NodeSchedulingEligible}}
	w.helpers = []api.ServiceRegistration{
		{NodeID: "node-1", Address: "10.0.0.1", Port: 4748, CreateIndex: 7},
		{NodeID: "node-1", Address: "10.0.0.1", Port: 4000, CreateIndex: 5}, // of the helper before
		{NodeID: "node-2", Address: "fd00::2", Port: 4748},
	}
	nomad := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var body any
		switch r.URL.Path {
		case "/v1/nodes":
			body = []api.NodeListStub{}
			if r.URL.Query().Get("prefix") != w.goneNode {
				body = []api.NodeListStub{w.node}
			}
		case "/v1/service/bivouac-node":
			body = w.helpers
		case "/v1/job/" + jobs.ID(spareID):
			if w.broken {
				http.Error(rw, "no leader", http.StatusInternalServerError)
				return
			}
			body = w.job
		case "/v1/job/" + jobs.ID(spareID) + "/allocations":
			body = []*api.AllocationListStub{w.spare}
		case "/v1/jobs":
			body = []*api.JobListStub{}
		case "/v1/job/" + jobs.ID(chatID) + "/allocations":
			body = []*api.AllocationListStub{}
		default:
			http.Error(rw, "there is no "+r.URL.Path, http.StatusNotFound)
			return
		}
		must.NoError(t, json.NewEncoder(rw).Encode(body))
	}))
	t.Cleanup(nomad.Close)
	sandbox := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(rw, w.answer) }))
	t.Cleanup(sandbox.Close)
	addr := netip.MustParseAddrPort(strings.TrimPrefix(sandbox.URL, "http://"))
	client, err := api.NewClient(&api.Config{Address: nomad.URL})
	must.NoError(t, err)
	template, err := jobs.Load("docker", nil)
	must.NoError(t, err)
	w.client, w.template = client, template
	w.Driver = w.another(t)
	w.cache.setCurrent(true)
	w.spare = &api.AllocationListStub{
		ID: "alloc-1", JobID: jobs.ID(spareID), NodeID: "node-1", NodeName: "first",
		DesiredStatus: api.AllocDesiredStatusRun, ClientStatus: api.AllocClientStatusRunning,
		TaskStates: map[string]*api.TaskState{"sandbox": {State: taskRunning, StartedAt: time.Now()}},
		AllocatedResources: &api.AllocatedResources{Shared: api.AllocatedSharedResources{
			Ports: []api.PortMapping{{Label: "http", HostIP: addr.Addr().String(), Value: int(addr.Port())}},
		}},
	}
	return w
}

// another returns a driver that knows nothing yet.
func (w *world) another(t *testing.T) *Driver {
	t.Helper()
	d, err := New(Config{Client: w.client, Template: w.template, Instance: "test", Helper: w.helper, Logger: hclog.NewNullLogger()})
	must.NoError(t, err)
	return d
}

// register puts a job with one allocation into the cache, as events do.
func (w *world) register(t *testing.T, spec runtime.Spec, change func(*jobFields)) {
	t.Helper()
	job, err := w.template.Job(spec, "test")
	must.NoError(t, err)
	fields := jobFieldsOf(job)
	fields.CreateIndex, fields.ModifyIndex, fields.JobModifyIndex = 1, 1, 1
	if change != nil {
		change(&fields)
	}
	w.job = fields
	w.cache.updateJob(fields)
	w.cache.updateAlloc(w.spare)
}

func ofPool() runtime.Spec {
	now := time.Date(2026, 5, 4, 3, 2, 1, 987654321, time.UTC)
	return runtime.Spec{SessionID: spareID, Pool: "small", CreatedAt: now, ExpiresAt: now.Add(time.Hour)}
}

// claimed is the spare after its claim.
func claimed(w *world) runtime.Sandbox {
	spec := claimOf(chatID)
	return runtime.Sandbox{
		SessionID: spareID, ChatID: chatID, Pool: "small", ContainerID: "alloc-1", State: runtime.StateRunning, Endpoint: endpointOf(w.spare, "http"),
		AgentID: spec.AgentID, VolumeHostPath: spec.VolumeHostPath, CreatedAt: spec.CreatedAt, ExpiresAt: spec.ExpiresAt,
		Owner: spec.Owner, Labels: spec.Labels,
	}
}

func claimOf(chatID string) runtime.Spec {
	spec := ofPool()
	spec.Owner, spec.Labels = "somebody", map[string]string{"team": "one"}
	spec.Pool, spec.ChatID, spec.AgentID, spec.VolumeHostPath = "", chatID, "agent-1", "/srv/volumes/one"
	return spec
}

func TestClaim(t *testing.T) {
	t.Run("lets_the_helper_on_the_node_bind_the_volume", func(t *testing.T) {
		w := newWorld(t)
		w.register(t, ofPool(), nil)
		sandbox, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		must.Eq(t, claimed(w), sandbox)
		meta := jobs.MetaOf(claimOf(chatID))
		meta[jobs.MetaInstance] = "test"
		note, err := json.Marshal(meta)
		must.NoError(t, err)
		must.Eq(t, []string{fmt.Sprintf("bind at 10.0.0.1:4748: %+v", nodeapi.Order{
			SessionID: spareID, ChatID: chatID, AgentID: "agent-1", VolumeHostPath: "/srv/volumes/one",
			AllocID: "alloc-1", Task: "sandbox", TaskDriver: "docker", Target: "/workspace", Note: string(note),
		})}, w.helper.orders)
	})
	t.Run("may_be_repeated_with_the_same_spec_only", func(t *testing.T) {
		w := newWorld(t)
		w.register(t, ofPool(), nil)
		first, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		again, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		must.Eq(t, first, again)
		_, err = w.Claim(t.Context(), claimOf("00000000-0000-4000-8000-000000000001"))
		must.ErrorIs(t, err, runtime.ErrConflict)
	})
	t.Run("describes_the_sandbox_as_one_that_was_created_for_the_chat", func(t *testing.T) {
		w := newWorld(t)
		w.register(t, ofPool(), nil)
		_, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		sandbox, err := w.Inspect(t.Context(), spareID)
		must.NoError(t, err)
		must.Eq(t, claimed(w), sandbox)
		found, err := w.FindChat(t.Context(), chatID, "")
		must.NoError(t, err)
		must.Eq(t, []runtime.Sandbox{claimed(w)}, found)
	})
	t.Run("takes_a_spare_that_another_replica_made_and_whose_start_Nomad_has_not_reported", func(t *testing.T) {
		w := newWorld(t)
		w.spare.ClientStatus, w.spare.TaskStates = api.AllocClientStatusPending, nil
		w.register(t, ofPool(), nil)
		sandbox, err := w.Claim(t.Context(), claimOf(chatID))
		must.NoError(t, err)
		must.Eq(t, runtime.StateRunning, sandbox.State)
	})
	for name, c := range map[string]struct {
		change func(*world, *jobFields)
		spec   runtime.Spec // zero: that of a chat
		want   error
		says   string
		asks   bool // the helper is asked meanwhile
	}{
		"an_unknown_spare":                 {spec: func() runtime.Spec { s := claimOf(chatID); s.SessionID = chatID; return s }(), want: runtime.ErrNotFound},
		"the_spec_of_a_spare":              {spec: ofPool(), want: runtime.ErrInvalid, says: `the pool "small"`},
		"a_wrong_spec":                     {spec: claimOf("x"), want: runtime.ErrInvalid, says: "chat ID"},
		"a_sandbox_that_is_no_spare":       {change: func(_ *world, j *jobFields) { delete(j.Meta, jobs.MetaPool) }, want: runtime.ErrConflict, says: "not a spare"},
		"a_spare_of_another_instance":      {change: func(_ *world, j *jobFields) { j.Meta[jobs.MetaInstance] = "other" }, want: runtime.ErrConflict, says: `instance "other"`},
		"a_stopped_spare":                  {change: func(_ *world, j *jobFields) { j.Stop = true }, want: runtime.ErrConflict, says: "it was stopped"},
		"a_spare_that_was_registered_anew": {change: func(_ *world, j *jobFields) { j.JobModifyIndex, j.ModifyIndex = 2, 2 }, want: runtime.ErrConflict, says: "registered again"},
		"a_spare_with_an_edited_pool":      {change: func(_ *world, j *jobFields) { j.Meta[jobs.MetaPool] = "large" }, want: runtime.ErrConflict, says: "another spec"},
		"a_spare_of_another_chat": {change: func(w *world, _ *jobFields) { w.helper.bound = map[string]nodeapi.Order{spareID: {ChatID: spareID}} },
			want: runtime.ErrConflict, says: "bound to chat " + spareID, asks: true},
		"a_spare_that_has_ended": {change: func(w *world, _ *jobFields) {
			w.spare.ClientStatus = api.AllocClientStatusFailed
			w.spare.TaskStates["sandbox"].State = taskDead
		}, want: runtime.ErrNotReady, says: "it is dead"},
		"a_spare_that_Nomad_ends": {change: func(w *world, _ *jobFields) {
			w.spare.DesiredStatus = api.AllocDesiredStatusStop
		}, want: runtime.ErrNotReady, says: "it is lost: being stopped"},
		"a_spare_on_a_lost_node": {change: func(w *world, _ *jobFields) {
			w.spare.ClientStatus = api.AllocClientStatusUnknown
		}, want: runtime.ErrNotReady, says: "node first is disconnected"},
		"a_spare_on_a_node_that_is_drained": {change: func(w *world, _ *jobFields) { w.node.Drain = true },
			want: runtime.ErrNotReady, says: "being drained", asks: true},
		"a_spare_on_a_node_that_is_not_eligible": {change: func(w *world, _ *jobFields) { w.node.SchedulingEligibility = api.NodeSchedulingIneligible },
			want: runtime.ErrNotReady, says: "not eligible", asks: true},
		"a_spare_on_a_node_that_has_just_missed_its_heartbeat": {change: func(w *world, _ *jobFields) { w.node.Status = api.NodeStatusDown },
			want: runtime.ErrNotReady, says: "node first takes no new sandboxes: it is down", asks: true},
		"a_spare_on_a_node_that_Nomad_has_forgotten": {change: func(w *world, _ *jobFields) { w.goneNode = w.spare.NodeID },
			want: runtime.ErrNotReady, says: "Nomad does not know node first any more", asks: true},
		"a_spare_that_does_not_answer": {change: func(w *world, _ *jobFields) { w.answer = "another one" },
			want: runtime.ErrNotReady, asks: true},
		"a_spare_on_a_node_without_helper": {change: func(w *world, _ *jobFields) { w.spare.NodeID = "node-3" },
			want: runtime.ErrNotPlaced, says: "node first runs no helper (bivouac node)"},
		"what_the_helper_refuses": {change: func(w *world, _ *jobFields) { w.helper.refuse = fmt.Errorf("%w: no such folder", runtime.ErrInvalid) },
			want: runtime.ErrInvalid, says: "helper on node first: invalid for this runtime: no such folder", asks: true},
	} {
		t.Run("refuses_"+name, func(t *testing.T) {
			w := newWorld(t)
			w.register(t, ofPool(), func(j *jobFields) {
				if c.change != nil {
					c.change(w, j)
				}
			})
			if c.spec.SessionID == "" {
				c.spec = claimOf(chatID)
			}
			_, err := w.Claim(t.Context(), c.spec)
			must.ErrorIs(t, err, c.want)
			must.ErrorContains(t, err, c.says)
			if !c.asks {
				must.SliceEmpty(t, w.helper.orders)
			}
			t.Log(err)
		})
	}
	t.Run("gives_up_a_helper_that_does_not_answer", func(t *testing.T) {
		w := newWorld(t)
		w.helper.hang = true
		w.register(t, ofPool(), nil)
		began := time.Now()
		_, err := w.Claim(t.Context(), claimOf(chatID))
		must.ErrorIs(t, err, runtime.ErrUnavailable)
		must.ErrorContains(t, err, "no answer within 5s")
		must.Less(t, 10*time.Second, time.Since(began))
	})
	t.Run("ends_with_its_context", func(t *testing.T) {
		w := newWorld(t)
		w.helper.hang = true
		w.register(t, ofPool(), nil)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := w.Claim(ctx, claimOf(chatID))
		must.ErrorIs(t, err, context.DeadlineExceeded)
		must.False(t, errors.Is(err, runtime.ErrUnavailable))
	})
	t.Run("is_unsupported_without_helpers", func(t *testing.T) {
		w := newWorld(t)
		d, err := New(Config{Client: w.client, Template: w.template, Instance: "test", Logger: hclog.NewNullLogger()})
		must.NoError(t, err)
		_, err = d.Claim(t.Context(), claimOf(chatID))
		must.ErrorIs(t, err, errors.ErrUnsupported)
		_, err = d.Create(t.Context(), ofPool(), func(runtime.Stage) {})
		must.ErrorIs(t, err, errors.ErrUnsupported)
		info, err := d.Info(t.Context())
		must.NoError(t, err)
		must.Eq(t, "", info.Variant)
	})
}

// The helper would refuse an order that does not fit its own rules.
func TestOrder_is_one_that_a_helper_accepts(t *testing.T) {
	for name, variables := range map[string]map[string]string{"docker": nil, "exec": {"command": "/bin/true"}, "raw_exec": nil} {
		template, err := jobs.Load(name, variables)
		must.NoError(t, err)
		d := &Driver{template: template, instance: &instance{id: "test"}}
		must.NoError(t, d.orderOf(spareID, &api.AllocationListStub{ID: chatID}).ValidateLook())
		job, err := template.Job(ofPool(), "test")
		must.NoError(t, err)
		// The largest session that there may be, with characters that JSON writes longest.
		long := claimOf(chatID)
		long.AgentID, long.VolumeHostPath = strings.Repeat("&", 256), "/"+strings.Repeat("&", 4095)
		for i := range 16 {
			long.Labels[fmt.Sprintf("%02d%s", i, strings.Repeat("k", 62))] = strings.Repeat("&", 256)
		}
		order, err := d.bindOrder(long, &api.AllocationListStub{ID: chatID})
		must.NoError(t, err)
		must.NoError(t, order.ValidateBind())
		text, err := json.Marshal(order)
		must.NoError(t, err)
		must.Less(t, nodeapi.MaxBody, len(text))

		folder := nodeapi.SessionDir
		if name == nodeapi.RawExec {
			folder = path.Join(nodeapi.SandboxesDir, spareID)
		}
		must.Eq(t, path.Join(folder, nodeapi.SessionFile), job.TaskGroups[0].Tasks[0].Env[jobs.SessionFileEnv])
	}
}

func TestInspect_tells_why_no_chat_should_get_a_spare(t *testing.T) {
	inspect := func(w *world) string {
		sandbox, err := w.Inspect(t.Context(), spareID)
		must.NoError(t, err)
		must.Eq(t, runtime.StateRunning, sandbox.State)
		return sandbox.Reason
	}
	w := newWorld(t)
	w.register(t, ofPool(), nil)
	must.Eq(t, "", inspect(w))
	w.node.Drain = true
	must.Eq(t, "", inspect(w), must.Sprint("it was read a moment ago"))
	w.eligibility = eligibility{}
	must.Eq(t, "node first takes no new sandboxes: it is being drained", inspect(w))
	w.node.Drain = false
	w.eligibility = eligibility{}
	_, err := w.Claim(t.Context(), claimOf(chatID))
	must.NoError(t, err)
	w.node.Drain = true
	must.Eq(t, "", inspect(w), must.Sprint("a chat has it"))
}

func TestInfo_names_the_variant_of_spares(t *testing.T) {
	w := newWorld(t)
	info, err := w.Info(t.Context())
	must.NoError(t, err)
	must.Eq(t, w.template.Variant(), info.Variant)
	must.NotEq(t, "", info.Variant)
}
