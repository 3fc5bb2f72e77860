package changelog

import (
	"slices"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
)

var (
	chat, otherChat = uuid.UUID{1}, uuid.UUID{2}
	a, b            = uuid.UUID{10}, uuid.UUID{11}
)

// log returns changes of the chat, each with the next index.
func log(changes ...Change) []Change {
	for i := range changes {
		changes[i].Chat = chat
		if changes[i].Index == 0 {
			changes[i].Index = uint64(10 * (1 + i))
		}
	}
	return changes
}

func is(what string, session uuid.UUID) Change { return Change{Type: what, Session: session} }

// at gives a change an index.
func at(index uint64, c Change) Change {
	c.Index = index
	return c
}

func spare(index uint64, what string) Change { return Change{Index: index, Type: what, Session: a} }

func edited(uuid.UUID) bool { return true }
func strict(uuid.UUID) bool { return false }

func TestCheckAccepts(t *testing.T) {
	created, ready := is("created", a), is("ready", a)
	for _, c := range []struct {
		name    string
		changes []Change
		remains Standing
	}{
		{"nothing", nil, Standing{}},
		{"a start", log(created), Standing{a, "creating"}},
		{"a session", log(created, ready), Standing{a, "running"}},
		{"a start that failed", log(created, is("start_failed", a)), Standing{}},
		{"a start that nobody finished", log(created, is("settled", a)), Standing{}},
		{"the delete of a start", log(created, is("deleted", a)), Standing{}},
		{"a sandbox that is lost, back and dead", log(created, ready, is("lost", a), is("running", a), is("dead", a)), Standing{a, "dead"}},
		{"renewals", log(created, ready, is("renewed", a), is("lost", a), is("renewed", a)), Standing{a, "lost"}},
		{"a renewal that sees that the sandbox is lost", log(created, ready, at(30, is("lost", a)), at(30, is("renewed", a))), Standing{a, "lost"}},
		{"a delete", log(created, ready, is("deleted", a)), Standing{}},
		{"an expiry", log(created, ready, is("expired", a)), Standing{}},
		{"a conflict that is told late", log(created, ready, is("deleted", a), is("conflict", a)), Standing{}},
		{"a replacement, in one transaction", log(created, ready, is("dead", a), at(40, is("replaced", a)), at(40, is("created", b))), Standing{b, "creating"}},
		{"a start in place of another", log(created, at(20, is("settled", a)), at(20, is("created", b))), Standing{b, "creating"}},
		{"spares", []Change{spare(1, "spare_ready"), spare(2, "spare_ended"), spare(3, "spare_failed")}, Standing{}},
		{"a sandbox without a record", log(created, ready, is("orphan_stopped", b)), Standing{a, "running"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			standing, problems := Check(c.changes, strict)
			must.SliceEmpty(t, problems)
			must.Eq(t, c.remains, standing[chat])
		})
	}
}

func TestCheckFinds(t *testing.T) {
	created, ready := is("created", a), is("ready", a)
	for _, c := range []struct {
		name    string
		changes []Change
		want    string
	}{
		{"a session that was never created", log(ready), "it was never created"},
		{"a change that is missing", log(created, is("deleted", a), is("created", b), is("expired", b)), "session " + b.String() + ", which is creating"},
		{"the end of a session that is missing", log(created, ready, is("created", b)), "session " + a.String() + ", which is running"},
		{"a change that is told twice", log(created, at(20, ready), at(20, ready)), "it was ready before"},
		{"a renewal that is told twice", log(created, ready, at(30, is("renewed", a)), at(30, is("renewed", a))), "it is reported twice"},
		{"a session that begins again", log(created, ready, is("deleted", a), created), "it was created before"},
		{"changes that changed places", log(created, at(30, ready), at(20, is("renewed", a))), "its index is below the one before"},
		{"two transactions with one index", log(created, at(20, ready), at(20, is("renewed", a))), "the index of another transaction"},
		{"a replacement without a sandbox", log(created, is("replaced", a)), "which is creating"},
		{"a second end", log(created, ready, is("deleted", a), is("expired", a)), "the chat has no session"},
		{"the end of another session", log(created, ready, is("dead", b)), "the chat has session " + a.String()},
		{"a start that failed when it was ready", log(created, ready, is("start_failed", a)), "which is running"},
		{"a sandbox that is back and was not away", log(created, ready, is("running", a)), "which is running"},
		{"life after death", log(created, ready, is("dead", a), is("running", a)), "which is dead"},
		{"a renewal of a dead session", log(created, ready, is("dead", a), is("renewed", a)), "which is dead"},
		{"a conflict with a session that was never ready", log(created, is("conflict", a)), "which is creating"},
		{"an orphan that has a record", log(created, ready, is("orphan_stopped", a)), "which is running"},
		{"an adoption", log(created, ready, is("adopted", b)), "which is running"},
		{"a repair", log(created, ready, is("repaired", a)), "nobody repaired"},
		{"another type", log(created, is("reused", a)), "no such type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, problems := Check(c.changes, strict)
			must.SliceNotEmpty(t, problems)
			must.StrContains(t, problems[0], c.want)
		})
	}
}

func TestCheckOfAnEditedChat(t *testing.T) {
	for _, c := range []struct {
		name    string
		changes []Change
		wrong   bool
	}{
		{"a session that ends twice", log(is("created", a), is("ready", a), is("deleted", a), is("expired", a)), false},
		{"an adoption", log(is("adopted", a), is("adopted", b)), false},
		{"a session that begins twice", log(is("created", a), is("created", a)), true},
		{"a spare that is claimed again", log(is("created", a), is("ready", a), is("replaced", b), is("created", a), is("ready", a)), false},
		{"a session that was never created", log(is("ready", a)), true},
		{"an order that is wrong", log(at(20, is("adopted", a)), at(10, is("expired", a))), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, problems := Check(c.changes, edited)
			must.Eq(t, c.wrong, len(problems) > 0)
		})
	}
}

func TestChangesOfManyChatsAreChecked(t *testing.T) {
	changes := log(is("created", a), is("created", b), is("ready", a))
	changes[1].Chat = otherChat
	standing, problems := Check(changes, strict)
	must.SliceEmpty(t, problems)
	must.Eq(t, map[uuid.UUID]Standing{chat: {a, "running"}, otherChat: {b, "creating"}}, standing)

	changes[1].Index = changes[0].Index
	_, problems = Check(changes, strict)
	must.SliceLen(t, 1, problems)
}

func TestDifference(t *testing.T) {
	all := log(is("created", a), is("ready", a), is("deleted", a))
	swapped := slices.Clone(all)
	swapped[1], swapped[2] = swapped[2], swapped[1]
	must.Eq(t, "", Difference(all, slices.Clone(all)))
	must.StrContains(t, Difference(all, all[:2]), "another did not")
	must.StrContains(t, Difference(all[:2], all), "another did not")
	must.StrContains(t, Difference(all, all[1:]), "as number 1 one reader")
	must.StrContains(t, Difference(all, swapped), "as number 2 one reader")
}

func TestCompare(t *testing.T) {
	by := func(request string, c Change) Change {
		c.Request = request
		return c
	}
	create := Request{ID: "1", Kind: "create", Chat: chat, Told: "created", Session: a}
	renew := Request{ID: "2", Kind: "renew", Chat: chat, Told: "renewed", Session: a}
	remove := Request{ID: "3", Kind: "delete", Chat: chat, Told: "deleted", Session: a}
	again := Request{ID: "4", Kind: "create", Chat: chat, Told: "replaced", Session: b}
	created, ready := by("1", is("created", a)), by("1", is("ready", a))
	replaced := log(created, ready, by("4", at(30, is("replaced", a))), by("4", at(30, is("created", b))), by("4", is("ready", b)))
	for _, c := range []struct {
		name     string
		changes  []Change
		requests []Request
		wrong    string
	}{
		{"every answer has its changes", log(created, ready, by("2", is("renewed", a)), by("3", is("deleted", a))), []Request{create, renew, remove}, ""},
		{"a replacement", replaced, []Request{create, again}, ""},
		{"what nobody asked for", log(created, ready, is("dead", a), is("expired", a)), []Request{create}, ""},
		{"a delete that another request finished", log(created, ready, by("5", is("deleted", a))), []Request{create, remove, {ID: "5", Kind: "delete", Chat: chat}}, ""},
		{"a request without an answer", log(created), []Request{{ID: "1", Kind: "create", Chat: chat}}, ""},

		{"a creation that is missing", nil, []Request{create}, `0 changes "created"`},
		{"a readiness that is missing", log(created), []Request{create}, `0 changes "ready"`},
		{"a renewal that is missing", log(created, ready), []Request{create, renew}, `0 changes "renewed"`},
		{"a delete that is missing", log(created, ready), []Request{create, remove}, `ends 0 times`},
		{"a delete that happened twice", log(created, ready, by("3", is("deleted", a)), is("settled", a)), []Request{create, remove}, `ends 2 times`},
		{"an expiry that is missing", log(created, ready), []Request{create, {ID: "6", Kind: "cleanup", Chat: chat, Told: "expired", Session: a}}, `ends 0 times`},
		{"a replacement that is missing", slices.Delete(slices.Clone(replaced), 2, 3), []Request{create, again}, `0 changes "replaced"`},
		{"a replacement where there was none", replaced, []Request{create, {ID: "4", Kind: "create", Chat: chat, Told: "created", Session: b}}, `1 changes "replaced"`},
		{"a change twice", log(created, ready, by("2", is("renewed", a)), by("2", is("renewed", a))), []Request{create, renew}, `2 changes "renewed"`},
		{"a change without a request", log(created, ready, is("deleted", a)), []Request{create}, `request "" asked for no delete`},
		{"a change of an unknown request", log(created, ready, by("7", is("renewed", a))), []Request{create}, `request "7" asked for no renew`},
		{"a change of a request of another kind", log(created, ready, by("2", is("deleted", a))), []Request{create, renew}, `request "2" asked for no delete`},
		{"a change of a request about another chat", log(created, ready, by("8", is("deleted", a))), []Request{create, {ID: "8", Kind: "delete", Chat: otherChat}}, `request "8" asked for no delete`},
	} {
		t.Run(c.name, func(t *testing.T) {
			problems := Compare(c.changes, c.requests, strict)
			if c.wrong == "" {
				must.SliceEmpty(t, problems)
				return
			}
			must.SliceNotEmpty(t, problems)
			must.StrContains(t, problems[0], c.wrong)
			must.SliceEmpty(t, Compare(c.changes, c.requests, edited))
		})
	}
}
