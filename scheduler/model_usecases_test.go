package scheduler_test

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// The use cases, as the model does them. Each returns its result, or "error KIND".

func (m *model) Create(cmd scheduler.CreateCommand) string {
	result, kind := m.create(cmd)
	if kind == "" {
		m.countResult("sandbox.create.total", result)
		return result
	}
	if kind != "conflict" {
		m.countResult("sandbox.create.total", "error")
		m.log("error", "sandbox_create_failed", "chat_id", chatNames[cmd.ChatID], "error", kind)
	}
	return "error " + kind
}

func (m *model) create(cmd scheduler.CreateCommand) (result, kind string) {
	chat := cmd.ChatID
	if kind := m.get(chat); kind != "" {
		return "", kind
	}
	if m.records[chat] != nil {
		seen := m.observe(chat)
		if seen.state == scheduler.StateRunning && seen.expires.After(m.now) {
			return m.reuseOrConflict(cmd, seen)
		}
	}
	if kind := m.lock(chat); kind != "" {
		return "", kind
	}
	defer m.release(chat)

	result = "created"
	current := m.records[chat]
	var seen modelSession
	if current != nil && current.state != scheduler.StateCreating {
		seen = m.observe(chat)
	}
	if kind := m.find(chat); kind != "" {
		return "", kind
	}
	if current != nil && current.state == scheduler.StateCreating {
		if kind = m.inspect(chat); kind == "" {
			kind = m.delete(chat, current.name)
		}
	} else if current != nil {
		result = "replaced"
		if kind = m.inspect(chat); kind != "" {
			return "", kind
		}
		m.log("info", "sandbox_replaced", named(chat, seen, "reason", seen.reason)...)
		if kind = m.markStopping(chat); kind == "" {
			kind = m.endSandbox(chat, seen, m.stop)
		}
	}
	if kind != "" {
		return "", kind
	}
	return result, m.start(cmd)
}

func (m *model) reuseOrConflict(cmd scheduler.CreateCommand, s modelSession) (result, kind string) {
	var reason string
	switch agent, volume := s.agent != cmd.AgentID, s.volume != cmd.VolumeHostPath; {
	case agent && volume:
		reason = "agent_id,volume_host_path"
	case agent:
		reason = "agent_id"
	case volume:
		reason = "volume_host_path"
	default:
		m.log("info", "sandbox_reused", named(cmd.ChatID, s)...)
		return "reused", ""
	}
	m.count("sandbox.create.total", map[string]string{"result": "conflict", "reason": reason})
	m.log("warn", "sandbox_conflict", named(cmd.ChatID, s,
		"requested_agent_id", cmd.AgentID, "session_agent_id", s.agent,
		"requested_volume_host_path", cmd.VolumeHostPath, "session_volume_host_path", s.volume,
		"reason", reason)...)
	return "", "conflict"
}

func (m *model) markStopping(chat uuid.UUID) string {
	stopping := *m.records[chat]
	if stopping.state == scheduler.StateStopping {
		return ""
	}
	stopping.state = scheduler.StateStopping
	if m.sandboxes[stopping.name] == nil {
		stopping.reason = "the runtime no longer knows the sandbox: it counts as ended once it no longer answers"
	}
	return m.write(chat, &stopping, false)
}

func (m *model) start(cmd scheduler.CreateCommand) string {
	chat := cmd.ChatID
	m.sessions++
	next := modelSession{
		name: "s" + itoa(m.sessions), agent: cmd.AgentID, volume: cmd.VolumeHostPath,
		state: scheduler.StateCreating, expires: m.now.Add(cmd.TTL),
	}
	if cmd.TTL == 0 {
		next.expires = m.now.Add(defaultTTL)
	}
	if kind := m.write(chat, &next, false); kind != "" {
		return kind
	}
	if m.faults[effect{chat, "driver.create"}].lock {
		m.lost = true
		m.abandon(chat, m.delete, next)
		return "lock_lost"
	}
	kind := m.try(chat, "driver.create", func() {
		m.containers++
		m.sandboxes[next.name] = &modelSandbox{
			container: "container-" + itoa(m.containers), state: scheduler.StateRunning, runs: true,
		}
	})
	if kind != "" {
		m.abandon(chat, m.delete, next)
		return kind
	}
	next.container, next.state = m.sandboxes[next.name].container, scheduler.StateRunning
	if kind := m.write(chat, &next, true); kind != "" {
		if look := m.get(chat); look != "" {
			m.log("warn", "sandbox_undo_failed", named(chat, next, "error", look)...)
			return kind
		}
		if *m.records[chat] != next { // else it was saved all the same
			m.abandon(chat, m.stop, next)
			return kind
		}
	}
	m.log("info", "sandbox_created", named(chat, next)...)
	return ""
}

// abandon is the compensation for a start or a save that failed.
func (m *model) abandon(chat uuid.UUID, end func(uuid.UUID, string) string, s modelSession) {
	kind := end(chat, s.name)
	if kind == "" {
		kind = m.write(chat, nil, true)
	}
	if kind != "" {
		m.log("warn", "sandbox_undo_failed", named(chat, s, "error", kind)...)
	}
}

// end stops a session's sandbox and then removes its record.
func (m *model) end(chat uuid.UUID, stop func(uuid.UUID, string) string) string {
	s := *m.records[chat]
	if kind := m.inspect(chat); kind != "" {
		return kind
	}
	if s.state != scheduler.StateCreating {
		if kind := m.markStopping(chat); kind != "" {
			return kind
		}
	}
	if kind := m.endSandbox(chat, s, stop); kind != "" {
		return kind
	}
	return m.write(chat, nil, true)
}

func (m *model) Delete(chat uuid.UUID) string {
	failed := func(kind string, args []any) string {
		m.countResult("sandbox.delete.total", "error")
		m.log("error", "sandbox_delete_failed", append(args, "error", kind)...)
		return "error " + kind
	}
	if kind := m.lock(chat); kind != "" {
		return failed(kind, []any{"chat_id", chatNames[chat]})
	}
	defer m.release(chat)
	found := m.records[chat]
	if kind := m.find(chat); kind != "" {
		if found == nil {
			return failed(kind, []any{"chat_id", chatNames[chat]})
		}
		return failed(kind, named(chat, *found))
	}
	if found == nil {
		m.countResult("sandbox.delete.total", "not_found")
		m.log("info", "sandbox_delete_not_found", "chat_id", chatNames[chat])
		return "not_found"
	}
	if kind := m.end(chat, m.delete); kind != "" {
		return failed(kind, named(chat, *found))
	}
	m.countResult("sandbox.delete.total", "deleted")
	m.log("info", "sandbox_deleted", named(chat, *found)...)
	return "deleted " + found.name + " " + found.container
}

func (m *model) Renew(chat uuid.UUID, ttl time.Duration) string {
	renewed, kind := m.renew(chat, ttl)
	if kind != "" {
		m.countResult("sandbox.renew.total", "error")
		m.log("warn", "sandbox_renew_failed", "chat_id", chatNames[chat], "error", kind)
		return "error " + kind
	}
	m.countResult("sandbox.renew.total", "renewed")
	m.log("info", "sandbox_renewed", named(chat, renewed, "expires_at", renewed.expires)...)
	return "renewed until " + renewed.expires.Format(time.TimeOnly)
}

func (m *model) renew(chat uuid.UUID, ttl time.Duration) (modelSession, string) {
	if kind := m.lock(chat); kind != "" {
		return modelSession{}, kind
	}
	defer m.release(chat)
	if m.records[chat] == nil || m.records[chat].state == scheduler.StateCreating {
		return modelSession{}, "not_found"
	}
	next := m.observe(chat)
	switch {
	case !next.expires.After(m.now):
		return next, "expired"
	case next.state == scheduler.StateDead || next.state == scheduler.StateStopping:
		return next, "not_running"
	}
	if later := m.now.Add(ttl); later.After(next.expires) {
		next.expires = later
	}
	if next == *m.records[chat] {
		return next, ""
	}
	kind := m.write(chat, &next, true)
	return next, kind
}

func (m *model) Cleanup() string {
	if kind := m.try(uuid.Nil, "list expired", func() {}); kind != "" {
		m.count("sandbox.cleanup.error.total", map[string]string{"error.type": kind, "reason": "list_expired"})
		m.log("error", "sandbox_cleanup_failed", "error", kind)
		return "error " + kind
	}
	var cleaned, failed int
	for chat := range chatNames {
		found := m.records[chat]
		if found == nil || found.state == scheduler.StateCreating || found.expires.After(m.now) {
			continue
		}
		kind := m.lock(chat)
		if kind == "" {
			kind = m.find(chat)
			if kind == "" {
				kind = m.end(chat, m.stop)
			}
			m.release(chat)
		}
		if kind != "" {
			failed++
			m.count("sandbox.cleanup.error.total", map[string]string{"error.type": kind})
			m.log("error", "sandbox_clean_failed", named(chat, *found, "error", kind)...)
			continue
		}
		cleaned++
		m.countResult("sandbox.cleanup.total", "cleaned")
		m.log("info", "sandbox_cleaned", named(chat, *found)...)
	}
	return fmt.Sprintf("cleaned %d, errors %d", cleaned, failed)
}

func (m *model) Settle() string {
	if kind := m.try(uuid.Nil, "list in flight", func() {}); kind != "" {
		return "error " + kind
	}
	for chat := range chatNames {
		found := m.records[chat]
		if found == nil || found.state != scheduler.StateCreating && found.state != scheduler.StateStopping {
			continue
		}
		kind := m.lock(chat)
		if kind == "lock_timeout" {
			continue
		}
		if kind == "" {
			kind = m.find(chat)
			if kind == "" {
				kind = m.end(chat, m.delete)
			}
			m.release(chat)
		}
		if kind != "" {
			m.log("warn", "sandbox_settle_failed", named(chat, *found, "error", kind)...)
			continue
		}
		m.log("info", "sandbox_settled", named(chat, *found, "state", found.state)...)
	}
	return "settled"
}

func (m *model) Get(chat uuid.UUID) string {
	if kind := m.get(chat); kind != "" {
		return "error " + kind
	}
	if m.records[chat] == nil {
		return "error not_found"
	}
	return describeModel(chat, m.observe(chat))
}

func describeModel(chat uuid.UUID, s modelSession) string {
	line := fmt.Sprintf("%s %s %s %s %s", chatNames[chat], s.name, s.state, s.container, s.expires.Format(time.TimeOnly))
	if s.reason != "" {
		line += ": " + s.reason
	}
	return line
}
