package nomadmodel

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
)

// Serve answers a request. ctx belongs to the connection.
func (s *Server) Serve(ctx context.Context, req *http.Request, body []byte) *http.Response {
	s.mu.Lock()
	leading := s.leading
	s.mu.Unlock()
	if !leading {
		return network.Text(http.StatusInternalServerError, "No cluster leader")
	}
	path, of, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v1/"), "/")
	switch {
	case req.Method == http.MethodPut && path == "jobs":
		return s.serveRegister(body)
	case req.Method == http.MethodPut && path == "job" && strings.HasSuffix(of, "/evaluate"):
		return s.serveEvaluate(strings.TrimSuffix(of, "/evaluate"))
	case req.Method == http.MethodPut && path == "client" && strings.HasSuffix(of, "/gc"):
		return s.serveCollect(strings.TrimSuffix(strings.TrimPrefix(of, "allocation/"), "/gc"))
	case req.Method == http.MethodDelete && path == "job":
		return s.serveDeregister(of, req.URL.Query().Get("purge") == "true")
	case req.Method == http.MethodGet && path == "event":
		return s.subscribe(ctx)
	case req.Method == http.MethodGet && path == "service":
		return s.serveService(ctx, of, req)
	case req.Method == http.MethodGet:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.serveRead(path, of, req)
	default:
		panic(fmt.Sprintf("nomadmodel: no model of %s %s", req.Method, req.URL))
	}
}

func (s *Server) answer(value any) *http.Response {
	resp := network.Answer(http.StatusOK, encode(value))
	resp.Header.Set("X-Nomad-Index", strconv.FormatUint(s.index, 10))
	resp.Header.Set("X-Nomad-Lastcontact", "0")
	resp.Header.Set("X-Nomad-Knownleader", "true")
	return resp
}

// serveRegister checks the index first and applies the registration later, as
// Nomad does. Another registration may arrive between the two.
func (s *Server) serveRegister(body []byte) *http.Response {
	var asked struct {
		Job            *api.Job
		EnforceIndex   bool
		JobModifyIndex uint64
	}
	if err := json.Unmarshal(body, &asked); err != nil {
		return network.Text(http.StatusBadRequest, err.Error())
	}
	s.mu.Lock()
	stands := s.jobs[*asked.Job.ID]
	s.mu.Unlock()
	switch {
	case asked.EnforceIndex && asked.JobModifyIndex == 0 && stands != nil:
		return network.Text(http.StatusInternalServerError, "Enforcing job modify index 0: job already exists")
	case asked.JobModifyIndex != 0:
		panic("nomadmodel: no model of an update with an index")
	}
	s.commit()

	s.mu.Lock()
	defer s.mu.Unlock()
	j, e := s.register(asked.Job)
	return s.answer(map[string]any{"EvalID": e.ID, "EvalCreateIndex": s.index, "JobModifyIndex": j.jobModifyIndex})
}

// commit waits for as long as an entry takes to pass through the log.
func (s *Server) commit() {
	rng := s.Rand("commit")
	gap := 100*time.Microsecond + time.Duration(rng.ExpFloat64()*float64(time.Millisecond))
	if rng.IntN(20) == 0 {
		gap += time.Duration(rng.Int64N(int64(40 * time.Millisecond)))
	}
	done := make(chan struct{})
	time.AfterFunc(gap, func() { close(done) })
	<-done
}

func (s *Server) serveDeregister(id string, purge bool) *http.Response {
	s.commit()
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := map[string]any{"EvalID": "", "JobModifyIndex": s.index}
	if e := s.deregister(id, purge); e != nil {
		answer["EvalID"], answer["EvalCreateIndex"] = e.ID, s.index
	}
	return s.answer(answer)
}

// serveEvaluate creates an evaluation of a job, as an operator may ask for.
func (s *Server) serveEvaluate(id string) *http.Response {
	s.commit()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	e := s.newEval(id, "job-register")
	s.publish(e.event())
	s.enqueue(e)
	return s.answer(map[string]any{"EvalID": e.ID, "EvalCreateIndex": s.index})
}

// serveCollect has a client garbage-collect an allocation. Once a task has failed, it
// answers although a poststop task may still run, as a client that shuts down does.
func (s *Server) serveCollect(allocID string) *http.Response {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.clients[allocID]
	switch {
	case s.allocs[allocID] == nil || r == nil:
		return network.Text(http.StatusNotFound, fmt.Sprintf("Unknown allocation %q", allocID))
	case !r.node.connected:
		return network.Text(http.StatusNotFound, "No path to node")
	case !r.over && !r.failed:
		return network.Text(http.StatusInternalServerError, "No such allocation on client, or allocation not eligible for GC")
	}
	return s.answer(nil)
}

// serviceIndex is the index of the services, which never change.
const serviceIndex = 5

// serveService lists the instances of a service. A blocking query for a change waits until
// its time is over.
func (s *Server) serveService(ctx context.Context, name string, req *http.Request) *http.Response {
	if index := req.URL.Query().Get("index"); index == strconv.Itoa(serviceIndex) {
		limit, err := time.ParseDuration(req.URL.Query().Get("wait"))
		if err != nil {
			panic("nomadmodel: no model of a blocking query without a limit")
		}
		_ = backoff.Sleep(ctx, limit) // nobody reads the answer if ctx has ended
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	instances := []*api.ServiceRegistration{}
	for i, n := range s.nodes {
		if name == s.Service {
			instances = append(instances, &api.ServiceRegistration{
				ServiceName: name, NodeID: n.id, Address: "127.0.0.1", Port: ServicePort + i, CreateIndex: serviceIndex, ModifyIndex: serviceIndex,
			})
		}
	}
	resp := s.answer(instances)
	resp.Header.Set("X-Nomad-Index", strconv.Itoa(serviceIndex))
	return resp
}

func (s *Server) serveRead(path, of string, req *http.Request) *http.Response {
	id, part, _ := strings.Cut(of, "/")
	switch {
	case path == "status":
		return s.answer("127.0.0.1:4647")
	case path == "node":
		for _, n := range s.nodes {
			if n.id == id {
				return s.answer(n.stub())
			}
		}
		return network.Text(http.StatusNotFound, "node not found")
	case path == "nodes":
		stubs := []api.NodeListStub{}
		for _, n := range s.nodes {
			if strings.HasPrefix(n.id, req.URL.Query().Get("prefix")) {
				stubs = append(stubs, n.stub())
			}
		}
		return s.answer(stubs)
	case path == "jobs":
		stubs := []*api.JobListStub{}
		for _, j := range sortedByID(s.jobs) {
			if strings.HasPrefix(*j.spec.ID, req.URL.Query().Get("prefix")) {
				stubs = append(stubs, j.stub())
			}
		}
		return s.answer(stubs)
	case path == "allocations":
		stubs := []api.AllocationListStub{}
		for _, a := range sortedByID(s.allocs) {
			stubs = append(stubs, a.AllocationListStub)
		}
		return s.answer(stubs)
	case path == "allocation":
		a := s.allocs[id]
		if a == nil {
			return network.Text(http.StatusNotFound, "alloc not found")
		}
		return s.answer(a.AllocationListStub) // both types have the same field names
	case path == "job" && part == "allocations":
		stubs := []api.AllocationListStub{}
		for _, a := range s.allocsOf(id) {
			stub := a.AllocationListStub
			stub.AllocatedResources = nil // this list omits them
			stubs = append(stubs, stub)
		}
		return s.answer(stubs)
	case path == "job" && part == "evaluations":
		evals := []api.Evaluation{}
		for _, e := range sortedByID(s.evals) {
			if e.JobID == id {
				evals = append(evals, e.Evaluation)
			}
		}
		return s.answer(evals)
	case path == "job" && part == "":
		j := s.jobs[id]
		if j == nil {
			return network.Text(http.StatusNotFound, "job not found")
		}
		return s.answer(j.view())
	default:
		panic(fmt.Sprintf("nomadmodel: no model of %s %s", req.Method, req.URL))
	}
}

// jobView holds the fields of a job that the model reports. Its groups are left
// out.
type jobView struct {
	ID                                       string
	Meta                                     map[string]string
	Stop                                     bool
	Status                                   string
	Version                                  uint64
	CreateIndex, ModifyIndex, JobModifyIndex uint64
}

func (j *job) view() jobView {
	return jobView{
		ID: *j.spec.ID, Meta: j.spec.Meta, Stop: j.stop, Status: j.status, Version: j.version,
		CreateIndex: j.createIndex, ModifyIndex: j.modifyIndex, JobModifyIndex: j.jobModifyIndex,
	}
}

func (j *job) stub() *api.JobListStub {
	return &api.JobListStub{
		ID: *j.spec.ID, Name: *j.spec.ID, Type: "batch", Meta: j.spec.Meta, Stop: j.stop, Status: j.status,
		CreateIndex: j.createIndex, ModifyIndex: j.modifyIndex, JobModifyIndex: j.jobModifyIndex,
	}
}
