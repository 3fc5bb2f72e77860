package nomadmodel

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// node is a Nomad client.
type node struct {
	id, name  string
	room      int
	ready     bool // as the servers see it
	connected bool // it and the servers reach each other
	agent     int  // counts disconnections, so that timers of older ones are recognized
	down      bool // its agent is down; the processes live on
	hangs     int  // while it is not 0, no process obeys a request to end
}

// run is an allocation as its node sees it.
type run struct {
	Process
	node    *node
	spec    *api.Job
	ending  bool // asked to stop
	again   bool // asked to end and start again
	hung    int  // the run that should have ended but did not because the node hangs
	gone    bool // it ended while its node's agent was down
	unsaved bool // the agent died before it had written down that it started the process
	alive   bool // whether the process really lives
	ready   bool // its port answers
	mute    bool // its port will not answer any more
	over    bool // it will not run again
	failed  bool
	started time.Time
	ended   time.Time
	last    *lastTask // nil if the group has no poststop task

	restarts uint64
	events   []*api.TaskEvent // the latest ones
	news     int              // number of things that happened
	told     int              // how many of them the servers know
}

// lastTask is a poststop task. It starts when the main task has ended, and
// nothing that Nomad is asked for ends it early.
type lastTask struct {
	name           string
	lasts          time.Duration
	started, ended time.Time
}

// lastTaskOf returns the group's poststop task. Its meta field "lasts" is its
// duration.
func lastTaskOf(spec *api.Job) *lastTask {
	for _, task := range spec.TaskGroups[0].Tasks {
		if task.Lifecycle != nil && task.Lifecycle.Hook == api.TaskLifecycleHookPoststop {
			lasts, err := time.ParseDuration(task.Meta["lasts"])
			if err != nil {
				panic("nomadmodel: no model of this poststop task: " + err.Error())
			}
			return &lastTask{name: task.Name, lasts: lasts}
		}
	}
	return nil
}

func (t *lastTask) state(over bool) string {
	switch {
	case over:
		return "dead"
	case !t.started.IsZero():
		return "running"
	default:
		return "pending"
	}
}

// maxEvents is how many events Nomad keeps for a task.
const maxEvents = 10

func (r *run) note(e api.TaskEvent) {
	e.Time = time.Now().UnixNano()
	r.news++
	r.events = append(r.events, &e)
	r.events = r.events[max(0, len(r.events)-maxEvents):]
}

func sortedByID[T any](m map[string]T) []T {
	var values []T
	for _, id := range slices.Sorted(maps.Keys(m)) {
		values = append(values, m[id])
	}
	return values
}

// tell delivers what the servers want of the allocation to its node. gone means
// that the servers no longer know the allocation.
func (s *Server) tell(a *alloc, gone bool) {
	s.after("tell "+a.node.name, 2*time.Millisecond, 30*time.Millisecond, func() {
		if !a.node.connected {
			return // it hears everything when it is back
		}
		s.hear(a, gone)
	})
}

func (s *Server) hear(a *alloc, gone bool) {
	r := s.clients[a.ID]
	wanted := a.DesiredStatus == api.AllocDesiredStatusRun && !gone
	switch {
	case r == nil && !gone:
		r = &run{node: a.node, spec: a.job, last: lastTaskOf(a.job), Process: Process{
			AllocID: a.ID, JobID: a.JobID, NodeID: a.NodeID, Meta: a.job.Meta, Env: a.job.TaskGroups[0].Tasks[0].Env, Port: a.AllocatedResources.Shared.Ports[0].Value,
		}}
		s.clients[a.ID] = r
		if wanted {
			s.after("start", 15*time.Millisecond, 250*time.Millisecond, func() { s.start(r) })
		} else {
			r.over = true
			s.sync(r)
		}
	case r != nil && !wanted && !r.ending:
		s.stop(r)
	}
}

// start starts the process unless it was stopped before that.
func (s *Server) start(r *run) {
	if r.over || r.ending || r.node.down {
		return
	}
	if s.Rand("start fails").IntN(40) == 0 {
		r.over, r.failed, r.ended = true, true, time.Now()
		r.note(api.TaskEvent{Type: api.TaskDriverFailure, DisplayMessage: "it did not start"})
		s.sync(r)
		return
	}
	r.alive, r.started = true, time.Now()
	r.Run++
	r.note(api.TaskEvent{Type: api.TaskStarted})
	s.trace("process of %s on %s starts, run %d", r.AllocID, r.node.name, r.Run)
	s.Started(r.Process)
	s.sync(r)
	s.after("listen", 5*time.Millisecond, 120*time.Millisecond, func() { r.ready = r.alive && !r.mute })
}

// stop asks the process to end, and kills it after the kill timeout.
func (s *Server) stop(r *run) {
	r.ending = true
	if r.over || !r.ended.IsZero() { // or its poststop task runs
		return
	}
	r.note(api.TaskEvent{Type: api.TaskKilling})
	if !r.alive {
		r.over, r.ended = true, time.Now()
		s.sync(r)
		return
	}
	s.endWithin(r)
}

// endWithin ends a process that was asked to end, at the latest after the kill
// timeout.
func (s *Server) endWithin(r *run) {
	kill := 5 * time.Second
	if t := r.spec.TaskGroups[0].Tasks[0].KillTimeout; t != nil {
		kill = *t
	}
	least := time.Millisecond
	if s.KillAtLast {
		least = kill
	}
	which := r.Run
	s.after("kill", least, kill, func() {
		switch {
		case r.Run != which:
		case r.node.hangs > 0:
			r.hung = which
		default:
			s.end(r, false)
		}
	})
}

// Hang keeps the processes of a node from ending when they are asked to, like a
// process that waits for a disk that does not answer. The function that it
// returns ends this and returns how many processes had to wait.
func (s *Server) Hang(nodeID string) (release func() int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[slices.IndexFunc(s.nodes, func(n *node) bool { return n.id == nodeID })]
	n.hangs++
	return func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		n.hangs--
		waited := 0
		for _, r := range s.runsOn(n) {
			if r.hung != r.Run || !r.alive {
				continue
			}
			waited++
			if n.hangs == 0 {
				s.endWithin(r)
			}
		}
		return waited
	}
}

// end ends the process.
func (s *Server) end(r *run, failed bool) {
	if !r.alive {
		return
	}
	s.trace("process of %s on %s ends", r.AllocID, r.node.name)
	r.alive, r.ready = false, false
	code := 0
	if failed {
		code = 137
	}
	r.note(api.TaskEvent{Type: api.TaskTerminated, ExitCode: code})
	s.Ended(r.Process)
	if r.again && !r.ending {
		r.again = false
		r.restarts++
		r.note(api.TaskEvent{Type: api.TaskRestarting})
		s.after("start again", 15*time.Millisecond, 250*time.Millisecond, func() { s.start(r) })
	} else {
		r.over, r.failed, r.ended = r.last == nil, failed, time.Now()
		if r.last != nil {
			s.after("last task", 15*time.Millisecond, 250*time.Millisecond, func() { s.startLast(r) })
		}
	}
	s.sync(r)
}

// startLast runs the poststop task.
func (s *Server) startLast(r *run) {
	r.last.started = time.Now()
	r.news++
	s.sync(r)
	s.after("last task ends", r.last.lasts, r.last.lasts, func() {
		r.over, r.last.ended = true, time.Now()
		r.news++
		s.sync(r)
	})
}

// Restart ends a process and starts another one in the same allocation. A
// client does this if an operator asks for it or a template changed, whatever
// the job's restart policy says.
func (s *Server) Restart(allocID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.clients[allocID]
	if r == nil || !r.alive || r.ending || r.again || r.node.down {
		return
	}
	s.trace("process of %s on %s is restarted", r.AllocID, r.node.name)
	r.again = true
	r.note(api.TaskEvent{Type: api.TaskRestartSignal, DisplayMessage: "User requested running tasks to restart"})
	s.sync(r)
	s.endWithin(r)
}

// sync reports the state of an allocation to the servers. A client delays
// reports by up to five ticks of 200 ms.
func (s *Server) sync(r *run) {
	s.after("sync", 5*time.Millisecond, time.Second, func() {
		if r.node.connected {
			s.report(r)
		}
	})
}

func (s *Server) report(r *run) {
	a := s.allocs[r.AllocID]
	if a == nil {
		return
	}
	status, task := api.AllocClientStatusPending, "pending"
	switch {
	case r.failed: // even if the poststop task still runs
		status, task = api.AllocClientStatusFailed, "dead"
	case r.over:
		status, task = api.AllocClientStatusComplete, "dead"
	case r.alive:
		status, task = api.AllocClientStatusRunning, "running"
	case r.last != nil && !r.last.started.IsZero():
		status, task = api.AllocClientStatusRunning, "dead"
	case !r.ended.IsZero():
		task = "dead"
	}
	if a.ClientStatus == status && r.told == r.news {
		return
	}
	r.told = r.news
	s.index++
	wasTerminal := a.terminal()
	a.ClientStatus, a.ModifyIndex = status, s.index
	a.TaskStates = map[string]*api.TaskState{"sandbox": {
		State: task, Failed: r.failed, Restarts: r.restarts, StartedAt: r.started, FinishedAt: r.ended, Events: slices.Clone(r.events),
	}}
	if r.last != nil {
		a.TaskStates[r.last.name] = &api.TaskState{
			State: r.last.state(r.over), StartedAt: r.last.started, FinishedAt: r.last.ended,
		}
	}
	s.trace("allocation %s is %s", a.ID, status)
	s.publish(a.event())
	if a.terminal() && !wasTerminal {
		s.unblock()
	}
}

// Kill ends one process, as if it crashed.
func (s *Server) Kill(allocID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.clients[allocID]; r != nil {
		s.end(r, true)
	}
}

// NodeID returns the ID of the i-th node.
func (s *Server) NodeID(i int) string { return s.nodes[i%len(s.nodes)].id }

// Disconnect cuts a node off from the servers. If agent is true, the node's
// agent dies too, and then nothing stops the node's processes. It returns false
// if the node is already cut off.
func (s *Server) Disconnect(i int, agent bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[i%len(s.nodes)]
	if !n.connected {
		return false
	}
	s.trace("%s is cut off, agent dead: %t", n.name, agent)
	n.connected, n.down = false, agent
	n.agent++
	epoch := n.agent
	still := func() bool { return !n.connected && n.agent == epoch }
	least, most := s.LostAfter, s.LostAfter
	if most == 0 {
		least, most = 10*time.Second, 30*time.Second
	}
	s.after("heartbeat", least, most, func() {
		if still() {
			s.lose(n)
		}
	})
	for _, r := range s.runsOn(n) {
		r.unsaved = agent && r.alive && time.Since(r.started) < s.SaveTime
		d := r.spec.TaskGroups[0].Disconnect
		if d == nil || d.StopOnClientAfter == nil || agent {
			continue
		}
		s.after("heartbeat stop", *d.StopOnClientAfter, *d.StopOnClientAfter+5*time.Second, func() {
			if still() && !r.ending {
				s.trace("%s, which hears nothing, stops %s", n.name, r.AllocID)
				if s.Stopped != nil {
					s.Stopped(r.Process)
				}
				s.stop(r)
			}
		})
	}
	return true
}

// PowerOff ends a node's agent and everything that runs there, as a reboot
// does. It returns false if the node is already cut off.
func (s *Server) PowerOff(i int) bool {
	if !s.Disconnect(i, true) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.runsOn(s.nodes[i%len(s.nodes)]) {
		if r.alive {
			s.trace("process of %s on %s ends", r.AllocID, r.node.name)
			r.alive, r.ready, r.again, r.gone = false, false, false, true
			s.Ended(r.Process)
		}
	}
	return true
}

// lose marks a node as lost, as the servers do when they no longer hear from
// it.
func (s *Server) lose(n *node) {
	s.trace("%s is lost", n.name)
	s.index++
	n.ready = false
	s.evaluate(n)
}

// evaluate creates an evaluation for each job that may run on the node.
func (s *Server) evaluate(n *node) {
	asked := make(map[string]bool)
	for _, a := range sortedByID(s.allocs) {
		if a.node == n && !a.terminal() && !asked[a.JobID] {
			asked[a.JobID] = true
			e := s.newEval(a.JobID, "node-update")
			s.publish(e.event())
			s.enqueue(e)
		}
	}
}

// Reconnect brings a node back. The node then hears what it missed and reports
// what became of its processes.
func (s *Server) Reconnect(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[i%len(s.nodes)]
	if n.connected {
		return
	}
	s.trace("%s is back", n.name)
	news := !n.ready || n.down // an agent that starts registers its node again
	n.connected, n.down, n.ready = true, false, true
	n.agent++
	if news {
		s.index++
		s.evaluate(n)
	}
	for _, a := range sortedByID(s.allocs) {
		if a.node == n {
			s.tell(a, false)
		}
	}
	for _, r := range s.runsOn(n) {
		if s.allocs[r.AllocID] == nil {
			s.stop(r)
		}
		switch {
		case r.unsaved && r.alive && !r.ending:
			// The agent starts the task again. The second process cannot have the port and
			// ends, and with the task's cgroup the first one ends.
			s.after("start twice", 31*time.Millisecond, 250*time.Millisecond, func() {
				if r.alive && s.Twice != nil {
					s.Twice(r.Process)
				}
				s.end(r, true)
			})
		case !r.gone:
		case r.ending:
			r.over, r.ended = true, time.Now()
		default:
			// The agent does not find the process and starts it again once it
			// has heard what the servers want.
			r.note(api.TaskEvent{Type: "Failed Restoring Task"})
			s.after("start again", 31*time.Millisecond, 250*time.Millisecond, func() { s.start(r) })
		}
		r.gone, r.unsaved = false, false
		s.sync(r)
	}
	s.unblock()
}

func (s *Server) runsOn(n *node) []*run {
	return slices.DeleteFunc(sortedByID(s.clients), func(r *run) bool { return r.node != n })
}

// Processes returns the live processes, sorted by allocation ID.
func (s *Server) Processes() []Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	var alive []Process
	for _, r := range s.clients {
		if r.alive {
			alive = append(alive, r.Process)
		}
	}
	slices.SortFunc(alive, func(a, b Process) int { return cmp.Compare(a.AllocID, b.AllocID) })
	return alive
}

// Inside calls f with a process, while the model is locked. It reports whether the process
// of the allocation lives; otherwise it does not call f.
func (s *Server) Inside(allocID string, f func(Process)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.clients[allocID]
	if r == nil || !r.alive {
		return false
	}
	f(r.Process)
	return true
}

// Mute keeps a process from answering for as long as it lives, like one that is in an
// endless loop.
func (s *Server) Mute(allocID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.clients[allocID]; r != nil {
		r.mute, r.ready = true, false
	}
}

// Answers reports whether a process answers on the port.
func (s *Server) Answers(port int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.clients {
		if r.Port == port && r.ready {
			return true
		}
	}
	return false
}

var _ network.Server = (*Server)(nil)

// stub returns what a list of nodes tells of the node.
func (n *node) stub() api.NodeListStub {
	status := api.NodeStatusReady
	if !n.ready {
		status = api.NodeStatusDown
	}
	return api.NodeListStub{ID: n.id, Name: n.name, Status: status, SchedulingEligibility: api.NodeSchedulingEligible}
}
