package nomad

import (
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// sandbox returns a job's state as a runtime.Sandbox. ok is false if there is no
// sandbox.
func (d *Driver) sandbox(s state) (sandbox runtime.Sandbox, ok bool) {
	if !s.known || s.job.tombstone() || d.notForeign(s) != nil {
		return runtime.Sandbox{}, false
	}
	meta := s.meta()
	sandbox = runtime.Sandbox{
		SessionID: s.job.Meta[jobs.MetaSessionID],
		ChatID:    meta[jobs.MetaChatID],
		Pool:      s.job.Meta[jobs.MetaPool],
		State:     runtime.StateStarting,
	}
	if spec, ok := jobs.SpecOf(meta); ok && spec.Pool == "" {
		sandbox.AgentID, sandbox.VolumeHostPath = spec.AgentID, spec.VolumeHostPath
		sandbox.CreatedAt, sandbox.ExpiresAt = spec.CreatedAt, spec.ExpiresAt
		sandbox.Owner, sandbox.Labels = spec.Owner, spec.Labels
	}
	if s.job.SubmitTime > 0 && !s.job.Stop && !s.job.altered() {
		sandbox.RegisteredAt = time.Unix(0, s.job.SubmitTime).UTC()
	}
	alloc := s.sandboxAlloc()
	if alloc == nil {
		if s.job.Stop && !s.pendingEval() {
			sandbox.State, sandbox.Reason = runtime.StateDead, d.whoStopped(s)
		}
		return sandbox, true
	}
	sandbox.ContainerID = alloc.ID
	sandbox.Endpoint = endpointOf(alloc, d.template.Ready().Port)
	sandbox.State, sandbox.Reason = d.stateOf(s, alloc)
	return sandbox, true
}

func (d *Driver) stateOf(s state, alloc *api.AllocationListStub) (runtime.State, string) {
	over := runOver(s.job, alloc)
	switch {
	case hasEnded(alloc) && !s.allEnded():
		return runtime.StateLost, d.whyEnded(s, alloc) + "; Nomad started it again, which is being stopped"
	case hasEnded(alloc):
		return runtime.StateDead, d.whyEnded(s, alloc)
	case isOutOfReach(alloc):
		return runtime.StateLost, unreachable(alloc)
	case over != "":
		return runtime.StateLost, over + "; what still runs is being stopped"
	case s.job.Stop || alloc.DesiredStatus != api.AllocDesiredStatusRun:
		return runtime.StateLost, "being stopped: " + d.whoEnded(s, alloc)
	case s.ready == alloc.ID || alloc.ClientStatus == api.AllocClientStatusRunning:
		return runtime.StateRunning, ""
	default:
		return runtime.StateStarting, ""
	}
}

// isOutOfReach reports whether Nomad cannot reach the allocation's node.
func isOutOfReach(alloc *api.AllocationListStub) bool {
	return alloc.ClientStatus == api.AllocClientStatusLost || alloc.ClientStatus == api.AllocClientStatusUnknown
}

// unreachable says that Nomad cannot reach the allocation's node.
func unreachable(alloc *api.AllocationListStub) string {
	what := "lost"
	if alloc.ClientStatus == api.AllocClientStatusUnknown {
		what = "disconnected"
	}
	return "node " + nodeName(alloc) + " is " + what + ": the sandbox may still run"
}

func nodeName(alloc *api.AllocationListStub) string {
	if alloc.NodeName != "" {
		return alloc.NodeName
	}
	return alloc.NodeID
}

// endpointOf returns the endpoint of an allocation's port, or zero if it is not
// known.
func endpointOf(alloc *api.AllocationListStub, label string) runtime.Endpoint {
	if alloc.AllocatedResources == nil {
		return runtime.Endpoint{}
	}
	ports := alloc.AllocatedResources.Shared.Ports
	i := slices.IndexFunc(ports, func(p api.PortMapping) bool { return p.Label == label })
	if i < 0 || ports[i].Value < 1 || ports[i].Value > 65535 {
		return runtime.Endpoint{}
	}
	ip, err := netip.ParseAddr(ports[i].HostIP)
	if err != nil {
		return runtime.Endpoint{}
	}
	return runtime.Endpoint{IP: ip, Port: uint16(ports[i].Value)}
}
