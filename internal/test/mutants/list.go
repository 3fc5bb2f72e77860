package main

// mutants returns the safeguards, each with what takes it away.
func mutants() []mutant {
	const (
		clock     = "internal/store/consul/clock.go"
		lease     = "internal/store/consul/lease.go"
		lock      = "internal/store/consul/lock.go"
		create    = "scheduler/create.go"
		reconcile = "scheduler/reconcile.go"
		stop      = "runtime/nomad/stop.go"
		watch     = "runtime/nomad/watch.go"
		run       = "runtime/nomad/run.go"
	)
	return []mutant{
		{without: "fence", changes: []change{
			{lease, `{{Verb: api.KVCheckIndex, Key: keys.lock(l.chatID), Index: l.lockIndex}}`, `{}`},
			{lease, `Verb: api.KVCAS, Key: keys.record(l.chatID), Index: l.index,`, `Verb: api.KVSet, Key: keys.record(l.chatID),`},
			{lease, `Verb: api.KVDeleteCAS, Key: keys.record(l.chatID), Index: l.index}`, `Verb: api.KVDelete, Key: keys.record(l.chatID)}`},
			{
				lease, `ops = append(ops, &api.KVTxnOp{Verb: api.KVDeleteCAS, Key: keys.lock(l.chatID), Index: l.lockIndex})`,
				`ops = append(ops, &api.KVTxnOp{Verb: api.KVDelete, Key: keys.lock(l.chatID)})`,
			},
		}},
		{without: "intent", changes: []change{
			{create, `if err := write(ctx, lease, &next, Keep); err != nil {`, `if err := error(nil); err != nil {`},
		}},
		// In the simulation hardly any registration comes after its session was stopped.
		{without: "tombstone", changes: []change{
			{stop, `return state{}, d.layTombstone(ctx, sessionID)`, `return s, nil`},
		}, noticedBy: test{"./runtime/nomad", "TestStop_makes_a_late_registration_fail"}},
		{without: "wait for terminal", changes: []change{
			{stop, `return s, d.running(ctx, s)`, `return s, nil`},
		}},
		{without: "chat mutex", changes: []change{
			{lock, `unlock, err := s.chats.Lock(ctx, chatID, wait)`, `unlock, err := func() {}, error(nil)`},
		}},
		{without: "disconnect block", changes: []change{
			{"jobs/sandbox.go", `group.Disconnect = &api.DisconnectStrategy{Replace: new(false), StopOnClientAfter: new(stopOnClientAfter)}`, ``},
		}},
		{without: "re-check in cleanup", changes: []change{
			{"scheduler/cleanup.go", `current.SessionID == listed.SessionID && current.Expired(s.Now())`, `current.SessionID == listed.SessionID`},
		}},
		{without: "adoption of what lost its record", changes: []change{
			{reconcile, `	case why == nil:`, `	case false:`},
		}},
		{without: "look for a chat's sandboxes before a create", changes: []change{
			{"scheduler/reclaim.go", `if err != nil || len(others) == 0 {`, `if true {`},
		}},
		// In the simulation nobody purges a job.
		{without: "question to a sandbox that its runtime forgot", changes: []change{
			{"scheduler/stop.go", `	if !ok || session.State == StateDead ||`, `	if !ok || true || session.State == StateDead ||`},
		}, noticedBy: test{"./scheduler", "TestSandboxThatItsRuntimeForgotAndThatAnswers"}},

		{without: "guard of jobs that Nomad gave up", changes: []change{
			{watch, `case givenUp > 0:`, `case false && givenUp > 0:`},
		}},
		{without: "end of a sandbox with its first run", changes: []change{
			{run, `if why := ranAgain(alloc.TaskStates[name]); why != "" {`, `if why := ranAgain(alloc.TaskStates[name]); false && why != "" {`},
		}},
		{without: "guard of second runs", changes: []change{
			{watch, `return runOver(s.job, first)`, `return ""`},
		}},
		// In the simulation a sandbox has one task.
		{without: "end of a sandbox with its first main task", changes: []change{
			{run, `return task.State == taskDead && !slices`, `return false && !slices`},
		}, noticedBy: test{"./runtime/nomad", "TestRun"}},
		// Nomad checks the index of a registration before the log. In the time
		// between, which is short, the simulation lays no tombstone.
		{without: "guard of jobs registered anew", changes: []change{
			{watch, `case s.job.altered():`, `case false && s.job.altered():`},
		}, noticedBy: test{"./runtime/nomad", "TestGuard_stops_what_overwrites_a_tombstone"}},
		{without: "wait for what Nomad decides", changes: []change{
			{stop, `case slices.ContainsFunc(evals, isPending):`, `case false && slices.ContainsFunc(evals, isPending):`},
		}},
		{without: "stop before purge", changes: []change{
			{stop, `d.client.Jobs().Deregister(jobID, false, opts)`, `d.client.Jobs().Deregister(jobID, true, opts)`},
		}},
		{without: "settling of what is in flight", changes: []change{
			{"scheduler/settle.go", `range inFlight {`, `range inFlight[:0] {`},
		}},
		// The time in which a save may be applied late is short.
		{without: "ruling out of a late save", changes: []change{
			{create, `ruledOut := ruleOut(look, lease, session, err)`, `ruledOut := error(nil)`},
		}, noticedBy: test{"./scheduler", "TestCreate_whatCannotBeUndoneIsSettled"}},
		{without: "bound of the agreed time", changes: []change{
			{clock, `case agreed != nil && (tick-*agreed).Abs() <= tolerance:`, `case true:`},
		}},
		{without: "clearing of stray locks", changes: []change{
			{lock, `h.strays[lease.id] = stray{`, `_ = stray{`},
		}},
		// The fence alone keeps a record right. This saves what is done in vain.
		{without: "local deadline of locks", changes: []change{
			{"internal/store/consul/hold.go", `return h.ended || !time.Now().Before(h.deadline)`, `return h.ended`},
		}, noticedBy: test{"./internal/store/consul", "TestReplicaThatIsCutOffStopsBeforeOthersBegin"}},
		// Without it a caller is told of doubt where there need be none.
		{without: "look after an unknown outcome", changes: []change{
			{lease, `		applied, settleErr := l.settle(ctx)`, `		applied, settleErr := (*write)(nil), error(nil)`},
		}, noticedBy: test{"./internal/store/consul", "TestWriteIsMadeOnceWhateverHappensToARequest"}},
		// In the simulation nothing is in flight when the store is wiped.
		{without: "identity check of writes", changes: []change{
			{lease, `	ops = append(ops, l.store.identity.unmoved())`, ``},
		}, noticedBy: test{"./internal/store/consul", "TestStoreThatLosesItsData"}},
		{without: "doubt about what a token may not read", changes: []change{
			{"internal/store/consul/request.go", `return nil, fmt.Errorf("%w: the answer lacks %s; may the Consul token read it?", scheduler.ErrUnavailable, key)`, `return &api.KVPair{Key: key}, nil`},
		}},
		{without: "standing still without an identity", changes: []change{
			{"internal/store/consul/identity.go", `case len(running) > 0:`, `case false:`},
		}},
		{without: "instance of each job", changes: []change{
			{"runtime/nomad/foreign.go", `case !d.instance.owns(id):`, `case false:`},
		}},
		{without: "doubt about what is not seen to start", changes: []change{
			{"scheduler/observe.go", `case sandbox.State == runtime.StateStarting && sandbox.ContainerID == "":`, `case false:`},
		}, noticedBy: test{"./scheduler", "TestGet_tellsWhatTheRuntimeSees"}},
		{without: "client's last word on a lost node", changes: []change{
			{"runtime/nomad/state.go", `		if len(alloc.TaskStates) == 0 {`, `		if true || len(alloc.TaskStates) == 0 {`},
		}, noticedBy: test{"./runtime/nomad", "TestHasEnded_believes_the_client_and_not_the_servers"}},
	}
}
