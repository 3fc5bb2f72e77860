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

// MaxStop is the longest that a template may let Nomad take to stop a sandbox:
// shutdown delays and kill timeouts, those of tasks that are stopped one after
// another added up. Bivouac waits a minute for a stop, in which Nomad also has
// to decide on it and to report the end.
const MaxStop = 45 * time.Second

// Nomad's defaults. The proxy is the task that Nomad adds for a service with a
// connect block.
const (
	defaultKillTimeout = 5 * time.Second
	defaultProxyDelay  = 5 * time.Second
)

// checkBlock refuses what would run a task of a sandbox twice, and what could
// keep a sandbox from ever ending. A sandbox is one run of its tasks, but the
// restart policy that Bivouac sets does not count where a new value restarts one.
// It does count for check_restart, which so ends the task, once and for all.
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
				"A task with hook = \"poststop\" cannot be set: Nomad never ends one that hangs, so that the sandbox could not be stopped. "+
					"Let the main task do it when it gets its kill_signal, within its kill_timeout.")
		}
	}
}

// checkChange refuses a reaction to a new value that starts the task again, or
// that no task can survive.
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
			"change_signal = %q cannot be set: a task cannot handle it, so that each change would end the sandbox or stop it short. "+
				"Write a signal that the task handles, such as \"SIGHUP\".", signal)
	}
}

// rangeOf returns where a block sets an argument, or else where the block is.
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
			"Nomad could take %v to stop a sandbox, and Bivouac waits for %v at most. Shorten shutdown_delay and kill_timeout: "+
				"that of the group, of the leader, of the slowest other task, and of the slowest sidecar add up.", longest, MaxStop)
	}
}

// longestStop returns how long Nomad's client lets the tasks of a group live
// once it was told to stop it. It waits for the group's delay, and then ends the
// leader, the other tasks, and the sidecars, one kind after the other.
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
