package jobs

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
)

// MaxStop is the longest time that a template may give Nomad to stop a sandbox:
// its shutdown delays and kill timeouts, added up for tasks that Nomad stops one
// after another. Bivouac waits one minute for a stop, and Nomad also needs time
// to schedule the stop and to report the end.
const MaxStop = 45 * time.Second

// These are Nomad's defaults. The proxy is the task that Nomad adds for a service
// with a connect block.
const (
	defaultKillTimeout = 5 * time.Second
	defaultProxyDelay  = 5 * time.Second
)

// checkBlock refuses a block that would run a task of a sandbox twice, or that
// could keep a sandbox from ever ending. A sandbox is one run of its tasks, but
// Nomad ignores the restart policy that Bivouac sets if a changed template or
// secret restarts a task. It respects the policy for check_restart, which
// therefore ends the task for good.
func (d *decoder) checkBlock(block *hclsyntax.Block, decoded any) {
	switch c := decoded.(type) {
	case *api.Template:
		d.checkChange(block, value(c.ChangeMode), "restart", value(c.ChangeSignal))
	case *api.Vault:
		d.checkChange(block, value(c.ChangeMode), "restart", value(c.ChangeSignal))
	case *api.WorkloadIdentity:
		d.checkChange(block, c.ChangeMode, "noop", c.ChangeSignal)
	case *api.TaskLifecycle:
		if c.Hook == api.TaskLifecycleHookPoststop {
			d.problem(rangeOf(block, "hook"), "Not for job templates",
				"A task with hook = \"poststop\" cannot be set: Nomad never ends one that hangs, so the sandbox could not be stopped. "+
					"Let the main task do this work when it gets its kill_signal, within its kill_timeout.")
		}
	}
}

// checkChange refuses a change_mode that restarts the task, and a change_signal
// that no task can handle.
func (d *decoder) checkChange(block *hclsyntax.Block, mode, unset, signal string) {
	if cmp.Or(mode, unset) == "restart" {
		instead := `"noop" or "signal"`
		if block.Type == "template" {
			instead = `"noop", "signal" or "script"`
		}
		how := ""
		if mode == "" {
			how = ", which is Nomad's default,"
		}
		d.problem(rangeOf(block, "change_mode"), "Not for job templates",
			"change_mode = \"restart\"%s cannot be set: %s. Write change_mode = %s in this %s block.", how, oneLife, instead, block.Type)
	}
	if signal = strings.ToUpper(signal); signal == "SIGKILL" || signal == "SIGSTOP" {
		d.problem(rangeOf(block, "change_signal"), "Not for job templates",
			"change_signal = %q cannot be set: a task cannot handle it, so each change would end or suspend the sandbox. "+
				"Write a signal that the task handles, such as \"SIGHUP\".", signal)
	}
}

// rangeOf returns the position of a block's argument, or of the block if it does
// not set that argument.
func rangeOf(block *hclsyntax.Block, argument string) hcl.Range {
	if attr := block.Body.Attributes[argument]; attr != nil {
		return attr.SrcRange
	}
	return block.DefRange()
}

// checkStop refuses a group that could take longer than MaxStop to stop.
func (d *decoder) checkStop(group *api.TaskGroup) {
	if longest := longestStop(group); longest > MaxStop {
		d.problem(d.ranges[group], "Too long a stop",
			"Nomad could take %v to stop a sandbox, but Bivouac allows %v at most. Shorten shutdown_delay and kill_timeout: "+
				"those of the group, of the leader, of the slowest other task and of the slowest sidecar add up.", longest, MaxStop)
	}
}

// longestStop returns how long a Nomad client may take to stop a group. The client
// waits for the group's delay, and then ends the leader, the other tasks and the
// sidecars, one kind after the other.
func longestStop(group *api.TaskGroup) time.Duration {
	var leader, others, sidecars time.Duration
	for _, task := range group.Tasks {
		kind := &others
		switch {
		case task.Leader:
			kind = &leader
		case task.Lifecycle != nil && task.Lifecycle.Sidecar:
			kind = &sidecars
		}
		*kind = max(*kind, task.ShutdownDelay+or(task.KillTimeout, defaultKillTimeout))
	}
	services := slices.Clone(group.Services)
	for _, task := range group.Tasks {
		services = append(services, task.Services...)
	}
	for _, service := range services {
		if service.Connect == nil || service.Connect.Native {
			continue
		}
		proxy := service.Connect.SidecarTask
		if proxy == nil {
			proxy = &api.SidecarTask{}
		}
		sidecars = max(sidecars, or(proxy.ShutdownDelay, defaultProxyDelay)+or(proxy.KillTimeout, defaultKillTimeout))
	}
	return or(group.ShutdownDelay, 0) + leader + others + sidecars
}

func value(p *string) string {
	if p == nil {
		return ""
	}
	return *p
}

func or(p *time.Duration, unset time.Duration) time.Duration {
	if p == nil {
		return unset
	}
	return *p
}
