package main

// mutants returns the safeguards, each with what takes it away.
func mutants() []mutant {
	const (
		lease = "internal/consul/lease.go"
		lock  = "internal/consul/lock.go"
		stop  = "runtime/nomad/stop.go"
		watch = "runtime/nomad/watch.go"
	)
	return []mutant{
		{"the fence", []change{
			{lease, `{{Verb: api.KVCheckIndex, Key: keys.lock(l.chatID), Index: l.lockIndex}}`, `{}`},
			{lease, `Verb: api.KVCAS, Key: keys.record(l.chatID), Index: l.index,`, `Verb: api.KVSet, Key: keys.record(l.chatID),`},
			{lease, `Verb: api.KVDeleteCAS, Key: keys.record(l.chatID), Index: l.index}`, `Verb: api.KVDelete, Key: keys.record(l.chatID)}`},
			{lease, `ops = append(ops, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: keys.lock(l.chatID), Index: l.lockIndex})`,
				`ops = append(ops, &api.KVTxnOp{Verb: api.KVDelete, Key: keys.lock(l.chatID)})`},
		}},
		{"the check of the lock in a write", []change{
			{lease, `{{Verb: api.KVCheckIndex, Key: keys.lock(l.chatID), Index: l.lockIndex}}`, `{}`},
		}},
		{"the intent to create", []change{
			{"scheduler/create.go", `if err := write(ctx, lease, &next, Keep); err != nil {`, `if err := error(nil); err != nil {`},
		}},
		{"the intent to stop", []change{
			{"scheduler/create.go", `if err := write(ctx, lease, &stopping, Keep); err != nil {`, `if err := error(nil); err != nil {`},
		}},
		{"settling what is in flight", []change{
			{"scheduler/settle.go", `range inFlight {`, `range inFlight[:0] {`},
		}},
		{"the tombstone", []change{
			{stop, `return state{}, d.layTombstone(ctx, sessionID)`, `return s, nil`},
		}},
		{"the wait for the end of a sandbox", []change{
			{stop, `return s, d.running(ctx, s)`, `return s, nil`},
		}},
		{"the wait for what Nomad decides", []change{
			{stop, `case slices.ContainsFunc(evals, isPending):`, `case false && slices.ContainsFunc(evals, isPending):`},
		}},
		{"the wait before a purge", []change{
			{stop, `d.client.Jobs().Deregister(jobID, false, opts)`, `d.client.Jobs().Deregister(jobID, true, opts)`},
		}},
		{"the chat's mutex", []change{
			{lock, `unlock, err := s.chats.Lock(ctx, chatID, wait)`, `unlock, err := func() {}, error(nil)`},
		}},
		{"the disconnect block", []change{
			{"jobs/sandbox.go", `group.Disconnect = &api.DisconnectStrategy{Replace: new(false), StopOnClientAfter: new(stopOnClientAfter)}`, ``},
		}},
		{"the second look in cleanup", []change{
			{"scheduler/cleanup.go", ` || !current.Expired(s.Now())`, ``},
		}},
		{"the guard of jobs that were registered anew", []change{
			{watch, `case s.job.altered():`, `case false && s.job.altered():`},
		}},
		{"clearing locks that were left behind", []change{
			{lock, `h.strays[lease.id] = stray{`, `_ = stray{`},
		}},
		{"the local deadline of locks", []change{
			{"internal/consul/hold.go", `return h.ended || !time.Now().Before(h.deadline)`, `return h.ended`},
		}},
		{"reading again after an unknown outcome", []change{
			{lease, `		applied, settleErr := l.settle(ctx)`, `		applied, settleErr := (*write)(nil), error(nil)`},
		}},
		{"doubt about what is not seen to start", []change{
			{"scheduler/observe.go", `case sandbox.State == runtime.StateStarting && sandbox.ContainerID == "":`, `case false:`},
		}},
	}
}
