package nomad

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"slices"
	"time"
	"unique"

	"github.com/google/uuid"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// packed is a state in little memory. The cache keeps all states in this form, because a
// replica may have a million of them, and the types of Nomad's API take many times as much.
//
// It has only those fields of allocations and evaluations that the driver reads from a
// state. A field that is to be read from now on must be added to packer.
type packed struct {
	own string // what only this job has; empty for the zero state
	// What the job has in common with other jobs, and its allocations with others on the
	// same node.
	job, node unique.Handle[string]
}

// pack packs a state. Unless withEvents is set, it leaves out the events of allocations that
// run as they should. Nomad can be asked for them.
func pack(s state, withEvents bool) packed {
	p := packer{withEvents: withEvents}
	p.state(&s)
	return packed{string(p.own.data), unique.Make(string(p.job.data)), unique.Make(string(p.node.data))}
}

// unpack returns the state of the job with that ID.
func (p packed) unpack(jobID string) state {
	if p.own == "" {
		return state{}
	}
	r := packer{own: reader(p.own), job: reader(p.job.Value()), node: reader(p.node.Value()), withEvents: true}
	s := state{job: jobFields{ID: jobID}}
	r.state(&s)
	return s
}

// packer writes a state to the three parts of a packed one, or reads it from them. Its
// methods do both, field by field, so the order is the same.
type packer struct {
	own, job, node codec
	withEvents     bool
}

func (p *packer) state(s *state) {
	p.own.bool(&s.known)
	p.own.bool(&s.gone)
	p.own.bool(&s.whole)
	p.own.text(&s.ready)
	p.own.text(&s.collected)
	p.own.text(&s.claim.allocID)
	p.own.bool(&s.job.Stop)
	number(&p.own, &s.job.CreateIndex)
	number(&p.own, &s.job.ModifyIndex)
	number(&p.own, &s.job.JobModifyIndex)
	number(&p.own, &s.job.SubmitTime)
	s.job.Meta = p.meta(s.job)
	if s.claim.allocID != "" {
		s.claim.meta = p.meta(jobFields{ID: s.job.ID, Meta: s.claim.meta})
	}
	s.allocs = list(&p.node, s.allocs, func(a *api.AllocationListStub) *api.AllocationListStub { return p.alloc(s.job, a) })
	evals := list(&p.job, slices.Collect(maps.Values(s.evals)), p.eval)
	s.evals = make(map[string]*api.Evaluation, len(evals))
	for _, eval := range evals {
		s.evals[eval.ID] = eval
	}
}

func (p *packer) meta(job jobFields) map[string]string {
	meta := make(map[string]string)
	for _, key := range keys(&p.job, job.Meta) {
		value := job.Meta[key]
		switch key {
		case jobs.MetaSessionID:
			sessionID, _ := sessionOf(job.ID)
			p.own.textOr(&value, sessionID)
		case jobs.MetaChatID, jobs.MetaVolumeHostPath:
			p.own.text(&value)
		case jobs.MetaCreatedAt, jobs.MetaExpiresAt:
			p.own.timeText(&value)
		case jobs.MetaSpec: // follows from the others as a rule
			continue
		default:
			p.job.text(&value)
		}
		meta[key] = value
	}
	spec := job.Meta[jobs.MetaSpec]
	p.own.textOr(&spec, jobs.Fingerprint(runtime.Spec{
		SessionID: meta[jobs.MetaSessionID], ChatID: meta[jobs.MetaChatID], AgentID: meta[jobs.MetaAgentID],
		VolumeHostPath: meta[jobs.MetaVolumeHostPath], Pool: meta[jobs.MetaPool],
	}))
	if spec != "" {
		meta[jobs.MetaSpec] = spec
	}
	return meta
}

func (p *packer) alloc(job jobFields, given *api.AllocationListStub) *api.AllocationListStub {
	a := orZero(given)
	a.JobID = job.ID
	p.own.text(&a.ID)
	number(&p.own, &a.CreateIndex)
	number(&p.own, &a.ModifyIndex)
	number(&p.own, &a.CreateTime)
	number(&p.own, &a.ModifyTime)
	p.node.text(&a.Namespace)
	p.node.text(&a.NodeID)
	p.node.text(&a.NodeName)
	p.node.text(&a.DesiredStatus)
	p.own.text(&a.DesiredDescription)
	p.node.text(&a.ClientStatus)
	p.node.text(&a.ClientDescription)
	p.own.text(&a.PreemptedByAllocation)
	a.AllocatedResources = p.resources(a.AllocatedResources)
	if !p.withEvents && runsAsItShould(job, &a) {
		a.TaskStates = withoutEvents(a.TaskStates)
	}
	tasks := make(map[string]*api.TaskState)
	for _, name := range keys(&p.node, a.TaskStates) {
		tasks[name] = p.task(a.TaskStates[name])
	}
	a.TaskStates = tasks
	return &a
}

// runsAsItShould reports whether an allocation runs, and nothing in the events of its tasks
// makes its run over.
func runsAsItShould(job jobFields, alloc *api.AllocationListStub) bool {
	bare := *alloc
	bare.TaskStates = withoutEvents(alloc.TaskStates)
	return alloc.DesiredStatus == api.AllocDesiredStatusRun && alloc.ClientStatus == api.AllocClientStatusRunning &&
		runOver(job, alloc) == "" && runOver(job, &bare) == ""
}

func withoutEvents(states map[string]*api.TaskState) map[string]*api.TaskState {
	bare := maps.Clone(states)
	for name, task := range states {
		copied := *task
		copied.Events = nil
		bare[name] = &copied
	}
	return bare
}

// resources packs an allocation's ports and the names of its tasks.
func (p *packer) resources(given *api.AllocatedResources) *api.AllocatedResources {
	known := given != nil
	p.node.bool(&known)
	if !known {
		return nil
	}
	r := orZero(given)
	r.Shared.Ports = list(&p.node, r.Shared.Ports, func(port api.PortMapping) api.PortMapping {
		p.node.text(&port.Label)
		p.node.text(&port.HostIP)
		number(&p.own, &port.Value)
		return port
	})
	tasks := make(map[string]*api.AllocatedTaskResources)
	for _, name := range keys(&p.node, r.Tasks) {
		tasks[name] = nil
	}
	r.Tasks = tasks
	return &r
}

func (p *packer) task(given *api.TaskState) *api.TaskState {
	t := orZero(given)
	p.node.text(&t.State)
	p.node.bool(&t.Failed)
	number(&p.own, &t.Restarts)
	p.own.time(&t.StartedAt)
	p.own.time(&t.FinishedAt)
	asJSON(&p.own, &t.Events, len(t.Events))
	return &t
}

func (p *packer) eval(given *api.Evaluation) *api.Evaluation {
	e := orZero(given)
	p.own.text(&e.ID)
	number(&p.own, &e.CreateIndex)
	number(&p.own, &e.ModifyIndex)
	p.job.text(&e.Status)
	p.own.text(&e.StatusDescription)
	p.own.time(&e.WaitUntil)
	asJSON(&p.own, &e.FailedTGAllocs, len(e.FailedTGAllocs))
	return &e
}

// orZero returns a copy of what is to be packed, or room for what is to be unpacked.
func orZero[T any](given *T) (zero T) {
	if given != nil {
		return *given
	}
	return zero
}

// codec writes values to a text, or reads them from it in the same order.
type codec struct {
	data  []byte // what was written
	reads bool
	rest  string // what is still to be read
}

func reader(text string) codec { return codec{reads: true, rest: text} }

// take reads the next n bytes.
func (c *codec) take(n int) string {
	text := c.rest[:n]
	c.rest = c.rest[n:]
	return text
}

func (c *codec) bool(v *bool) {
	switch {
	case c.reads:
		*v = c.take(1) == "1"
	case *v:
		c.data = append(c.data, '1')
	default:
		c.data = append(c.data, '0')
	}
}

func number[T int | int64 | uint64](c *codec, v *T) {
	if !c.reads {
		c.data = binary.AppendVarint(c.data, int64(*v))
		return
	}
	x, n := binary.Varint([]byte(c.rest[:min(len(c.rest), binary.MaxVarintLen64)]))
	c.take(n)
	*v = T(x)
}

// isUUID is the length of a text that is a UUID, of which only the 16 bytes are written.
const isUUID = -1

func (c *codec) text(v *string) {
	n := len(*v)
	var id uuid.UUID
	if n == len(uuid.Nil.String()) {
		var err error
		if id, err = uuid.Parse(*v); err == nil && id.String() == *v {
			n = isUUID
		}
	}
	number(c, &n)
	switch {
	case c.reads && n == isUUID:
		*v = uuid.UUID([]byte(c.take(len(id)))).String()
	case c.reads:
		*v = c.take(n)
	case n == isUUID:
		c.data = append(c.data, id[:]...)
	default:
		c.data = append(c.data, *v...)
	}
}

// textOr is text. It needs only one byte for the usual text.
func (c *codec) textOr(v *string, usual string) {
	isUsual := *v == usual
	c.bool(&isUsual)
	if isUsual {
		*v = usual
	} else {
		c.text(v)
	}
}

// time keeps the moment, in UTC.
func (c *codec) time(v *time.Time) {
	isZero := v.IsZero()
	c.bool(&isZero)
	if isZero {
		*v = time.Time{}
		return
	}
	ns := v.UnixNano()
	number(c, &ns)
	*v = time.Unix(0, ns).UTC()
}

// timeText is text. It needs fewer bytes for a time.
func (c *codec) timeText(v *string) {
	format := func(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339Nano) }
	var ns int64
	isTime := false
	if !c.reads {
		at, err := time.Parse(time.RFC3339Nano, *v)
		ns = at.UnixNano()
		isTime = err == nil && format(ns) == *v
	}
	c.bool(&isTime)
	if !isTime {
		c.text(v)
		return
	}
	number(c, &ns)
	*v = format(ns)
}

// list writes or reads the items of a list with each.
func list[T any](c *codec, given []T, each func(T) T) []T {
	n := len(given)
	number(c, &n)
	items := make([]T, n)
	copy(items, given)
	for i := range items {
		items[i] = each(items[i])
	}
	return items
}

// keys writes or reads the keys of a map, in order.
func keys[V any](c *codec, m map[string]V) []string {
	return list(c, slices.Sorted(maps.Keys(m)), func(key string) string {
		c.text(&key)
		return key
	})
}

// asJSON is for what is rarely there. n is how much of it there is to write.
func asJSON[T any](c *codec, v *T, n int) {
	var text string
	if n > 0 {
		data, err := json.Marshal(v)
		if err != nil {
			panic(err) // it was decoded from JSON
		}
		text = string(data)
	}
	c.text(&text)
	if c.reads && text != "" {
		if err := json.Unmarshal([]byte(text), v); err != nil {
			panic(err) // see above
		}
	}
}
