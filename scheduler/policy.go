package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Policy says what its callers may do. A caller with several policies may do what one
// of them allows as a whole.
type Policy struct {
	Name     string
	Agents   []AgentRule // the one with the longest prefix of the AI agent's ID applies
	Operator Level       // requests about the server, and about the sessions of all AI agents
	Metrics  bool        // may read the metrics
}

// AgentRule says what callers may do with the sessions of some AI agents.
type AgentRule struct {
	// Prefix selects the AI agents whose ID begins with these bytes. The empty prefix
	// selects all.
	Prefix       string
	Capabilities Capabilities
	// VolumeRoots are the folders whose direct subfolders may be volumes of new
	// sessions. If there are none, every volume that the server allows may be one.
	VolumeRoots []string
	MaxSessions int           // of all AI agents with the prefix together; 0: no limit
	MaxTTL      time.Duration // 0: the server's
}

// Capabilities is a set of capabilities.
type Capabilities uint8

// The capabilities. The zero value allows nothing.
const (
	CapRead  Capabilities = 1 << iota // see sessions
	CapWrite                          // create, renew and delete sessions; includes CapRead
	CapLogs                           // read the logs of sandboxes
	CapExec                           // run commands in sandboxes
)

// EachCapability returns the capabilities, one in each set.
func EachCapability() []Capabilities {
	return []Capabilities{CapRead, CapWrite, CapLogs, CapExec}
}

// String returns the name of a capability, as the configuration has it. It returns "" if
// the set has not exactly one.
func (c Capabilities) String() string {
	switch c {
	case CapRead:
		return "read"
	case CapWrite:
		return "write"
	case CapLogs:
		return "logs"
	case CapExec:
		return "exec"
	default:
		return ""
	}
}

// has reports whether the set allows one capability.
func (c Capabilities) has(one Capabilities) bool {
	return c&one != 0 || one == CapRead && c&CapWrite != 0
}

// Level is how much of an operator's work a caller may do.
type Level int

// The levels. Each includes those before it.
const (
	LevelNone  Level = iota
	LevelRead        // configuration and health in detail
	LevelWrite       // cleanup, and decisions about records
)

// rule returns the rule with the longest prefix of the agent ID. The zero rule, which
// allows nothing, is returned if there is none.
func (p *Policy) rule(agentID string) AgentRule {
	var best AgentRule
	for _, rule := range p.Agents {
		if strings.HasPrefix(agentID, rule.Prefix) && len(rule.Prefix) >= len(best.Prefix) {
			best = rule
		}
	}
	return best
}

// May reports whether the caller has a capability for the sessions of an AI agent.
func (c Caller) May(capability Capabilities, agentID string) bool {
	return c.Policies == nil || slices.ContainsFunc(c.Policies, func(p *Policy) bool {
		return p.rule(agentID).Capabilities.has(capability)
	})
}

// MayOperate returns ErrPermissionDenied unless the caller may do an operator's work of
// this level.
func (c Caller) MayOperate(level Level) error {
	if c.Policies == nil || slices.ContainsFunc(c.Policies, func(p *Policy) bool { return p.Operator >= level }) {
		return nil
	}
	name := "read"
	if level == LevelWrite {
		name = "write"
	}
	return fmt.Errorf(`%w: %q needs a policy with operator = %q`, ErrPermissionDenied, c.Name, name)
}

// MayReadMetrics returns ErrPermissionDenied unless the caller may read the metrics.
func (c Caller) MayReadMetrics() error {
	if c.Policies == nil || slices.ContainsFunc(c.Policies, func(p *Policy) bool { return p.Metrics }) {
		return nil
	}
	return fmt.Errorf(`%w: %q needs a policy with metrics = "read"`, ErrPermissionDenied, c.Name)
}

// readsAll reports whether the caller may see the sessions of all AI agents.
func (c Caller) readsAll() bool {
	return c.Policies == nil || slices.ContainsFunc(c.Policies, func(p *Policy) bool {
		return p.rule("").Capabilities.has(CapRead) && !slices.ContainsFunc(p.Agents, func(r AgentRule) bool {
			return !r.Capabilities.has(CapRead)
		})
	})
}

// require returns ErrPermissionDenied unless the caller has a capability for the AI agent.
// Use it only for an agent ID from the caller, or one that it may see.
func (c Caller) require(capability Capabilities, agentID string) error {
	if c.May(capability, agentID) {
		return nil
	}
	return fmt.Errorf("%w: %q has no capability %q for agent_id %q", ErrPermissionDenied, c.Name, capability, agentID)
}

// grants are the rules that allow a caller to create a session. Each is enough.
// Nil means that nothing limits the caller.
type grants []AgentRule

// mayCreate returns the rules that allow a create, and limits the TTL of the command,
// which is 0 for the default, to the longest of them.
func (c Caller) mayCreate(cmd CreateCommand, ttl time.Duration) (grants, time.Duration, error) {
	if c.Policies == nil {
		return nil, ttl, nil
	}
	if err := c.require(CapWrite, cmd.AgentID); err != nil {
		return nil, 0, err
	}
	allowed := c.writes(cmd.AgentID)
	allowed = slices.DeleteFunc(allowed, func(r AgentRule) bool {
		return !isVolumeOf(r.VolumeRoots, cmd.VolumeHostPath)
	})
	if len(allowed) == 0 {
		return nil, 0, fmt.Errorf("%w: %q may not use this volume_host_path for agent_id %q", ErrPermissionDenied, c.Name, cmd.AgentID)
	}
	return allowed.limitTTL(cmd.TTL, ttl)
}

// mayRenew returns the TTL for a renewal, which is limited like that of a create.
func (c Caller) mayRenew(agentID string, asked, ttl time.Duration) (time.Duration, error) {
	if c.Policies == nil {
		return ttl, nil
	}
	if err := c.require(CapWrite, agentID); err != nil {
		return 0, err
	}
	_, ttl, err := c.writes(agentID).limitTTL(asked, ttl)
	return ttl, err
}

// writes returns the rules that let the caller write for an AI agent.
func (c Caller) writes(agentID string) grants {
	var allowed grants
	for _, p := range c.Policies {
		if rule := p.rule(agentID); rule.Capabilities.has(CapWrite) {
			allowed = append(allowed, rule)
		}
	}
	return allowed
}

// limitTTL keeps the rules that allow a TTL. If the caller asked for none, the default
// ttl is shortened to what the rules allow.
func (g grants) limitTTL(asked, ttl time.Duration) (grants, time.Duration, error) {
	longest := slices.MaxFunc(g, func(a, b AgentRule) int { return cmp.Compare(a.maxTTL(), b.maxTTL()) }).maxTTL()
	if asked == 0 {
		ttl = min(ttl, longest)
	}
	if ttl > longest {
		return nil, 0, invalid("ttl", fmt.Sprintf("is over the maximum of %s that the caller's policies allow", longest))
	}
	return slices.DeleteFunc(g, func(r AgentRule) bool { return r.maxTTL() < ttl }), ttl, nil
}

func (r AgentRule) maxTTL() time.Duration {
	if r.MaxTTL == 0 {
		return 1<<63 - 1
	}
	return r.MaxTTL
}
