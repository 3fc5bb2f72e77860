package main

// mutants returns the safeguards, each with what takes it away: how the lines
// change that are marked with its name, as in
//
//	case givenUp > 0: // safeguard: guard of jobs that Nomad gave up
func mutants() []mutant {
	return []mutant{
		{without: "fence", line: words("KVCheckIndex", "KVGetOrEmpty", "KVCAS", "KVSet", "KVDeleteCAS", "KVDelete")},
		{without: "intent", line: instead(`return nil`)},
		// In the simulation, a registration hardly ever arrives after its
		// session was stopped.
		{without: "tombstone", line: instead(`return s, nil`), noticedBy: test{"./runtime/nomad", "TestStop_makes_a_late_registration_fail"}},
		{without: "wait for terminal", line: instead(`return s, nil`)},
		{without: "chat mutex", line: instead(`unlock, err := func() {}, error(nil)`)},
		{without: "disconnect block", line: instead(``)},
		{without: "re-check in cleanup", line: words(" && current.Expired(s.Now())", "")},
		{without: "adoption of what lost its record", line: never},
		{without: "look for a chat's sandboxes before a create", line: always},
		// In the simulation nobody purges a job.
		{without: "question to a sandbox that its runtime forgot", line: always, noticedBy: test{"./scheduler", "TestSandboxThatItsRuntimeForgotAndThatAnswers"}},

		{without: "guard of jobs that Nomad gave up", line: never},
		{without: "end of a sandbox with its first run", line: never},
		{without: "guard of second runs", line: instead(`return ""`)},
		// In the simulation a sandbox has one task.
		{without: "end of a sandbox with its first main task", line: never, noticedBy: test{"./runtime/nomad", "TestRun"}},
		// Nomad checks the index of a registration before the log. The time
		// between the two is short, and in the simulation no tombstone is
		// registered within it.
		{without: "guard of jobs registered anew", line: never, noticedBy: test{"./runtime/nomad", "TestGuard_stops_what_overwrites_a_tombstone"}},
		{without: "wait for what Nomad decides", line: never},
		{without: "stop before purge", line: words("false", "true")},
		{without: "settling of what is in flight", line: words("inFlight", "inFlight[:0]")},
		// The time in which a save may be applied late is short.
		{without: "ruling out of a late save", line: instead(`ruledOut := error(nil)`), noticedBy: test{"./scheduler", "TestCreate_whatCannotBeUndoneIsSettled"}},
		{without: "bound of the agreed time", line: always},
		{without: "clearing of stray locks", line: words("h.leftovers[lease.id] =", "_ =")},
		// The fence alone keeps records correct. This safeguard avoids useless
		// work.
		{without: "local deadline of locks", line: words(" || !time.Now().Before(h.deadline)", ""), noticedBy: test{"./internal/store/consul", "TestReplicaThatIsCutOffStopsBeforeOthersBegin"}},
		// Without it, a caller gets an unknown outcome although the outcome can
		// be found out.
		{without: "look after an unknown outcome", line: instead(`applied, settleErr := (*write)(nil), error(nil)`), noticedBy: test{"./internal/store/consul", "TestWriteIsMadeOnceWhateverHappensToARequest"}},
		// In the simulation nothing is in flight when the store is wiped.
		{without: "identity check of writes", line: instead(``), noticedBy: test{"./internal/store/consul", "TestStoreThatLosesItsData"}},
		{without: "doubt about what a token may not read", line: instead(`return &api.KVPair{Key: key}, nil`)},
		{without: "standing still without an identity", line: never},
		{without: "instance of each job", line: never},
		{without: "doubt about what is not seen to start", line: never, noticedBy: test{"./scheduler", "TestGet_tellsWhatTheRuntimeSees"}},
		{without: "change of an end", line: words(", s.change(ctx, what, session, session.Reason)", "")},
		{without: "changes in the transaction of their record", line: instead(``)},
		{without: "one step for a record and its changes", line: instead(`w.note = note{}; if err = l.write(ctx, w); err == nil { for _, c := range changes { _ = l.store.NoteChange(ctx, c) } }`)},
		// In the simulation there are too few changes to open a segment.
		{without: "check of the segment", line: words("KVCheckIndex", "KVGetOrEmpty"), noticedBy: test{"./internal/store/consul", "TestWriterThatIsLateWritesToTheCurrentSegment"}},
		{without: "single storing of changes", line: instead(`_ = earlier`), noticedBy: test{"./internal/store/consul", "TestChangeIsStoredOnceWhateverHappensToARequest"}},
		{without: "report of a gap in the changes", line: never, noticedBy: test{"./internal/store/consul", "TestChangesContract"}},
		// In the simulation there is no audit log.
		{without: "audit before what nobody asked for", line: never, noticedBy: test{"./scheduler", "TestAudit"}},
		// In the simulation nobody reads events.
		{without: "report of a gap to readers", line: never, noticedBy: test{"./scheduler", "TestEvents_tell_a_gap"}},
		{without: "check of the spare with the intent", line: instead(``)},
		{without: "spare removed with the intent", line: instead(``)},
		{without: "one leader fills pools", line: instead(`err := error(nil)`)},
		// In the simulation a sandbox may end at any time.
		{without: "end of a spare that was claimed", line: instead(`return spare, nil`), noticedBy: test{"./scheduler", "TestPool_ends_no_spare_that_was_claimed"}},
		{without: "no claim of a spare that does not answer", line: never},
		{without: "hearing of claims", line: words("bound.Orders", "bound.Orders[:0]")},
		{without: "end of a spare's record with its adoption", line: always},
		{without: "look at a spare before its end", line: never, noticedBy: test{"./scheduler", "TestClaimed_spare_that_lost_its_record_is_adopted"}},
		{without: "spare of another chat", line: never, noticedBy: test{"./scheduler", "TestCreate_leaves_the_spare_of_another_chat_alone"}},
		// In the simulation there are no processes.
		{without: "helper does not trust the environment of a process", line: never, noticedBy: test{"./internal/node", "TestHelperDoesNotTrustTheEnvironment"}},
		// In the simulation a sandbox has one task.
		{without: "client's answer for one task", line: never, noticedBy: test{"./runtime/nomad", "TestCollect"}},
		{without: "client's last word on a lost node", line: always, noticedBy: test{"./runtime/nomad", "TestHasEnded_believes_the_client_and_not_the_servers"}},
	}
}
