package consulmodel_test

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/consul/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/simulate/consulmodel"
	"github.com/bivouac/bivouac/internal/test/simulate/network"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// probe asks a Consul questions and records the answers. Two Consuls behave
// alike if their probes record the same.
type probe struct {
	*testing.T
	client *api.Client
	prefix string
	root   *api.Client // may do everything; set only for a probe without rights
	seen   []string
}

// TestModelAnswersAsConsulDoes asks the model and a real Consul the same
// questions.
func TestModelAnswersAsConsulDoes(t *testing.T) {
	for name, ask := range map[string]func(*probe){
		"locks":             (*probe).locks,
		"conditions":        (*probe).conditions,
		"reads":             (*probe).reads,
		"all or nothing":    (*probe).allOrNothing,
		"trees":             (*probe).trees,
		"equal values":      (*probe).equalValues,
		"puts":              (*probe).puts,
		"destroyed session": (*probe).destroyedSession,
		"expired session":   (*probe).expiredSession,
		"blocking reads":    (*probe).blockingReads,
		"blocking lists":    (*probe).blockingLists,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			consul, prefix := stack.ConsulForTest(t)
			client, err := consul.Client()
			must.NoError(t, err)
			consulProbe := &probe{T: t, client: client, prefix: prefix}

			server := consulmodel.New(2)
			t.Cleanup(server.Close)
			client, err = api.NewClient(&api.Config{HttpClient: &http.Client{Transport: network.Direct{Server: server}}})
			must.NoError(t, err)
			model := &probe{T: t, client: client, prefix: prefix}

			compare(t, consulProbe, model, ask)
		})
	}
}

func compare(t *testing.T, consul, model *probe, ask func(*probe)) {
	modelled := make(chan struct{})
	go func() { // in parallel, because some probes take long
		defer close(modelled)
		ask(model)
	}()
	ask(consul)
	<-modelled
	must.SliceNotEmpty(t, consul.seen)
	must.Eq(t, consul.seen, model.seen, must.Sprint("what Consul says, and what the model says"))
}

// TestModelDeniesAsConsulDoes compares the model with a Consul that denies by
// default, for a client without a token. Consul refuses some requests with an
// error and answers others with silently reduced results.
func TestModelDeniesAsConsulDoes(t *testing.T) {
	management := uuid.NewString()
	consul, err := stack.StartConsul(t.Context(), stack.ConsulConfig{ManagementToken: management})
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, consul.Stop()) })
	client := func(config api.Config) *api.Client {
		client, err := api.NewClient(&config)
		must.NoError(t, err)
		return client
	}
	server := consulmodel.New(2)
	t.Cleanup(server.Close)
	direct := func(server network.Server) api.Config {
		return api.Config{HttpClient: &http.Client{Transport: network.Direct{Server: server}}}
	}
	compare(t, &probe{
		T: t, prefix: "probe/",
		client: client(api.Config{Address: consul.Addr()}),
		root:   client(api.Config{Address: consul.Addr(), Token: management}),
	}, &probe{
		T: t, prefix: "probe/", client: client(direct(server.WithoutRights())), root: client(direct(server)),
	}, (*probe).withoutRights)
}

func (p *probe) withoutRights() {
	rightful := &probe{T: p.T, client: p.root, prefix: p.prefix}
	stands := rightful.txn(rightful.set("x/a", "1"))
	held := rightful.session(time.Nanosecond)

	p.txn(p.op(api.KVGetOrEmpty, "x/a"), p.op(api.KVGetOrEmpty, "missing"), p.op(api.KVGetTree, "x/"))
	p.txn(p.at(api.KVCheckIndex, "x/a", stands[0].ModifyIndex), p.op(api.KVGetOrEmpty, "x/a"))
	p.txn(p.op(api.KVCheckNotExists, "missing"))
	p.txn(p.op(api.KVGetOrEmpty, "x/a"), p.set("x/b", "2"), p.op(api.KVDelete, "x/a"))
	p.txn(p.lock("l", held, "v"), p.op(api.KVGetOrEmpty, "x/a"))
	p.txn(p.at(api.KVCAS, "x/a", stands[0].ModifyIndex), p.at(api.KVDeleteCAS, "x/a", stands[0].ModifyIndex))
	for _, below := range []string{"x/", "none/"} {
		keys, meta, err := p.client.KV().Keys(p.prefix+below, "/", &api.QueryOptions{RequireConsistent: true})
		p.see("keys %q, error %v, an index: %t, filtered: %t", keys, err,
			meta != nil && meta.LastIndex > 0, meta != nil && meta.ResultsFilteredByACLs)
	}
	for _, key := range []string{"x/a", "missing"} {
		pair, _, err := p.client.KV().Get(p.prefix+key, &api.QueryOptions{RequireConsistent: true})
		p.see("get: %t, error %v", pair != nil, err)
		_, err = p.client.KV().Put(&api.KVPair{Key: p.prefix + key}, nil)
		p.see("put: error %v", err)
	}
	_, _, err := p.client.Session().CreateNoChecks(&api.SessionEntry{TTL: "10s", Behavior: api.SessionBehaviorDelete}, nil)
	p.see("session: error %v", node.ReplaceAllString(fmt.Sprint(err), "NODE"))
	entry, _, err := p.client.Session().Renew(held, nil)
	p.see("renew: %t, error %v", entry != nil, node.ReplaceAllString(fmt.Sprint(err), "NODE"))
	_, err = p.client.Session().Destroy(held, nil)
	p.see("destroy: error %v", node.ReplaceAllString(fmt.Sprint(err), "NODE"))
	leader, err := p.client.Status().Leader()
	p.see("a leader: %t, error %v", leader != "", err)

	entry, _, err = p.root.Session().Renew(held, nil)
	p.see("the session stands: %t, error %v", entry != nil, err)
	pair, _, err := p.root.KV().Get(p.prefix+"x/a", nil)
	p.see("the key stands: %t, error %v", pair != nil, err)
}

// node matches the node name in Consul's error about a missing session right.
var node = regexp.MustCompile(`on "[^"]*"`)

var (
	numbers  = regexp.MustCompile(`\b\d+\b`)
	sessions = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+`)
)

func (p *probe) see(format string, args ...any) {
	text := strings.ReplaceAll(fmt.Sprintf(format, args...), p.prefix, "")
	text = numbers.ReplaceAllString(sessions.ReplaceAllString(text, "SESSION"), "N")
	p.seen = append(p.seen, text)
}

func (p *probe) op(verb api.KVOp, key string) *api.KVTxnOp {
	return &api.KVTxnOp{Verb: verb, Key: p.prefix + key}
}

func (p *probe) set(key, value string) *api.KVTxnOp {
	op := p.op(api.KVSet, key)
	op.Value = []byte(value)
	return op
}

func (p *probe) at(verb api.KVOp, key string, index uint64) *api.KVTxnOp {
	op := p.op(verb, key)
	op.Index = index
	return op
}

func (p *probe) lock(key, session, value string) *api.KVTxnOp {
	op := p.set(key, value)
	op.Verb, op.Session = api.KVLock, session
	return op
}

// txn runs a transaction, records its answer and returns the pairs in it.
func (p *probe) txn(ops ...*api.KVTxnOp) []*api.KVPair {
	var all api.TxnOps
	for _, op := range ops {
		all = append(all, &api.TxnOp{KV: op})
	}
	ok, resp, _, err := p.client.Txn().Txn(all, nil)
	if err != nil {
		p.see("error %v", err)
		return nil
	}
	p.see("applied: %t", ok)
	for _, e := range resp.Errors {
		p.see("operation %s: %s", string(rune('a'+e.OpIndex)), e.What)
	}
	var pairs []*api.KVPair
	for _, r := range resp.Results {
		pairs = append(pairs, r.KV)
		p.see("%s = %q, flags %v, lock index %s, session %q, exists %t", r.KV.Key, r.KV.Value, r.KV.Flags,
			strings.Repeat("I", int(min(r.KV.LockIndex, 9))), r.KV.Session, r.KV.ModifyIndex != 0)
	}
	return pairs
}

func (p *probe) session(delay time.Duration) string {
	id, _, err := p.client.Session().CreateNoChecks(&api.SessionEntry{
		TTL: "10s", LockDelay: delay, Behavior: api.SessionBehaviorDelete,
	}, nil)
	if err != nil {
		p.see("create a session: %v", err)
	}
	return id
}

func (p *probe) locks() {
	a, b := p.session(time.Nanosecond), p.session(time.Nanosecond)
	first := p.txn(p.lock("l", a, "one"), p.op(api.KVGetOrEmpty, "r"))
	again := p.txn(p.lock("l", a, "one"))
	p.see("a lock taken again keeps its index: %t", first[0].ModifyIndex == again[0].ModifyIndex)
	other := p.txn(p.lock("l", a, "two"))
	p.see("with another value it does not: %t", first[0].ModifyIndex != other[0].ModifyIndex)
	p.txn(p.lock("l", b, "three"))
	p.txn(p.at(api.KVCheckIndex, "l", first[0].ModifyIndex))
	p.txn(p.at(api.KVCheckIndex, "l", other[0].ModifyIndex), p.set("r", "v"), p.at(api.KVDeleteCAS, "l", other[0].ModifyIndex))
	p.txn(p.lock("l", b, "four"))
	p.txn(p.lock("m", "00000000-0000-4000-8000-000000000000", ""))
	p.txn(p.set("l", "by nobody"))
	p.txn(p.op(api.KVGetOrEmpty, "l"))
	p.txn(p.op(api.KVDelete, "l"))
	p.txn(p.lock("l", a, "five"))
}

func (p *probe) conditions() {
	stands := p.txn(p.set("a", "1"))[0].ModifyIndex
	for _, verb := range []api.KVOp{api.KVCheckIndex, api.KVCAS, api.KVDeleteCAS} {
		p.txn(p.at(verb, "a", stands-1))
		p.txn(p.at(verb, "a", 0))
		p.txn(p.at(verb, "missing", 0))
		p.txn(p.op(api.KVDelete, "missing"))
		p.txn(p.at(verb, "missing", 7))
		p.txn(p.op(api.KVGetOrEmpty, "missing"))
		p.txn(p.op(api.KVDelete, "missing"))
	}
	p.txn(p.op(api.KVCheckNotExists, "a"))
	p.txn(p.op(api.KVCheckNotExists, "missing"))
	p.txn(p.at(api.KVCAS, "a", stands), p.at(api.KVCheckIndex, "a", stands))
	p.txn(p.at(api.KVDeleteCAS, "a", stands))
	p.txn(p.op(api.KVGetOrEmpty, "a"))
	p.txn(slices.Repeat([]*api.KVTxnOp{p.op(api.KVGetOrEmpty, "a")}, 129)...)
}

func (p *probe) reads() {
	p.txn(p.set("x/b/1", "1"), p.set("x/a/1", "2"), p.set("x/a/2", "3"), p.set("y", "4"))
	p.txn(p.op(api.KVGetTree, "x/"), p.op(api.KVGetTree, "none/"), p.op(api.KVGetOrEmpty, "y"))
	for _, separator := range []string{"", "/"} {
		for _, below := range []string{"x/", "none/"} {
			keys, meta, err := p.client.KV().Keys(p.prefix+below, separator, &api.QueryOptions{RequireConsistent: true})
			p.see("keys %q, error %v, an index: %t", keys, err, meta != nil && meta.LastIndex > 0)
		}
	}
	for _, below := range []string{"x/", "none/"} {
		pairs, meta, err := p.client.KV().List(p.prefix+below, &api.QueryOptions{RequireConsistent: true})
		for _, pair := range pairs {
			p.see("listed: %s = %q", pair.Key, pair.Value)
		}
		p.see("error %v, an index: %t", err, meta != nil && meta.LastIndex > 0)
	}
	leader, err := p.client.Status().Leader()
	p.see("a leader: %t, error %v", leader != "", err)
}

// blockingLists checks what wakes a blocking read of a tree.
func (p *probe) blockingLists() {
	list := func(index uint64, wait time.Duration) (int, uint64, time.Duration) {
		began := time.Now()
		pairs, meta, err := p.client.KV().List(p.prefix+"t/", &api.QueryOptions{RequireConsistent: true, WaitIndex: index, WaitTime: wait})
		if err != nil {
			p.see("error %v", err)
			return 0, 0, 0
		}
		return len(pairs), meta.LastIndex, time.Since(began)
	}
	const short, long = 400 * time.Millisecond, 30 * time.Second
	during := func(what string, wait time.Duration, op *api.KVTxnOp) {
		before, index, _ := list(0, 0)
		done := make(chan struct{})
		time.AfterFunc(100*time.Millisecond, func() {
			defer close(done)
			if _, _, _, err := p.client.Txn().Txn(api.TxnOps{{KV: op}}, nil); err != nil {
				p.Error(err)
			}
		})
		after, next, took := list(index, wait)
		<-done
		p.see("%s: %s pairs before, %s after, a later index %t, at once %t",
			what, strings.Repeat("I", before), strings.Repeat("I", after), next > index, took < wait)
	}
	p.txn(p.set("t/a", "1"), p.set("u", "1"))
	during("a value changes", long, p.set("t/a", "2"))
	during("another key changes", short, p.set("u", "2"))
	during("a key is added", long, p.set("t/b", "1"))
	during("a key is removed", long, p.op(api.KVDelete, "t/a"))
	during("the last key is removed", long, p.op(api.KVDelete, "t/b"))
	during("it is empty, another key changes", short, p.set("u", "3"))
	during("the first key is added", long, p.set("t/a", "1"))
}

func (p *probe) allOrNothing() {
	p.txn(p.set("a", "1"))
	p.txn(p.set("a", "2"), p.set("b", "2"), p.at(api.KVCAS, "a", 1), p.op(api.KVCheckNotExists, "b"), p.op(api.KVDelete, "a"))
	p.txn(p.op(api.KVGetOrEmpty, "a"), p.op(api.KVGetOrEmpty, "b"))
}

// trees checks what the order of operations in a transaction means: a key that is
// written after its tree was deleted stays.
func (p *probe) trees() {
	p.txn(p.set("x/1", "1"), p.set("x/2", "2"), p.set("y", "3"))
	p.txn(p.op(api.KVCheckNotExists, "x/1"), p.op(api.KVDeleteTree, "x/"), p.set("x/3", "3"))
	p.txn(p.op(api.KVGetTree, "x/"))
	p.txn(p.op(api.KVCheckNotExists, "x/4"), p.op(api.KVDeleteTree, "x/"), p.set("x/3", "4"))
	p.txn(p.op(api.KVGetTree, "x/"))
	p.txn(p.op(api.KVDeleteTree, "none/"), p.op(api.KVDeleteTree, "x/"))
	p.txn(p.op(api.KVGetTree, "x/"), p.op(api.KVGetOrEmpty, "y"))
}

func (p *probe) equalValues() {
	first := p.txn(p.set("a", "1"))[0]
	second := p.txn(p.set("a", "1"), p.set("b", "1"))[0]
	p.see("a value set again keeps its index: %t", first.ModifyIndex == second.ModifyIndex)
	cas := p.set("a", "1")
	cas.Verb, cas.Index = api.KVCAS, first.ModifyIndex
	third := p.txn(cas)[0]
	p.see("by check and set, too: %t", first.ModifyIndex == third.ModifyIndex)
	fourth := p.txn(p.set("a", "2"))[0]
	p.see("another one does not: %t, and keeps where it was created: %t",
		first.ModifyIndex != fourth.ModifyIndex, first.CreateIndex == fourth.CreateIndex)
}

func (p *probe) puts() {
	kv := p.client.KV()
	pair := &api.KVPair{Key: p.prefix + "a", Value: []byte("1")}
	_, err := kv.Put(pair, nil)
	p.see("put: error %v", err)
	done, _, err := kv.CAS(pair, nil) // index 0: only if the key does not exist
	p.see("first put where one stands: %t, error %v", done, err)
	stands, _, err := kv.Get(pair.Key, nil)
	p.see("it is %q, error %v", stands.Value, err)
	next := &api.KVPair{Key: pair.Key, Value: []byte("2"), ModifyIndex: stands.ModifyIndex}
	done, _, err = kv.CAS(next, nil)
	p.see("put over it: %t, error %v", done, err)
	done, _, err = kv.CAS(next, nil)
	p.see("and again: %t, error %v", done, err)
}

func (p *probe) destroyedSession() {
	a, b := p.session(time.Minute), p.session(time.Nanosecond)
	p.txn(p.lock("l", a, "a"), p.set("r", "v"), p.lock("m", b, "b"))
	_, err := p.client.Session().Destroy(a, nil)
	p.see("destroy: error %v", err)
	p.txn(p.op(api.KVGetOrEmpty, "l"), p.op(api.KVGetOrEmpty, "r"), p.op(api.KVGetOrEmpty, "m"))
	p.txn(p.lock("l", b, "b"))
	p.txn(p.set("l", "b"))
	p.txn(p.lock("n", a, "a"))
	entry, _, err := p.client.Session().Renew(a, nil)
	p.see("renew what is gone: %t, error %v", entry != nil, err)
	entry, _, err = p.client.Session().Renew(b, nil)
	p.see("renew what stands: %t, TTL %s, error %v", entry != nil, entry.TTL, err)
	_, err = p.client.Session().Destroy(a, nil)
	p.see("destroy what is gone: error %v", err)
}

// expiredSession looks halfway between the TTL and twice the TTL, when nothing
// may have happened yet, and again after that. A session that is renewed lives
// on.
func (p *probe) expiredSession() {
	began := time.Now()
	a, b := p.session(time.Nanosecond), p.session(time.Nanosecond)
	p.txn(p.lock("l", a, "a"), p.lock("m", b, "b"))
	for _, at := range []time.Duration{15 * time.Second, 23 * time.Second} {
		<-time.After(at - time.Since(began))
		entry, _, err := p.client.Session().Renew(b, nil)
		p.see("the one that is renewed stands: %t, error %v", entry != nil, err)
		p.txn(p.op(api.KVGetOrEmpty, "l"), p.op(api.KVGetOrEmpty, "m"))
	}
	p.txn(p.lock("l", b, "b"))
}

func (p *probe) blockingReads() {
	kv := p.client.KV()
	get := func(key string, index uint64, wait time.Duration) (*api.KVPair, uint64, time.Duration) {
		began := time.Now()
		pair, meta, err := kv.Get(p.prefix+key, &api.QueryOptions{RequireConsistent: true, WaitIndex: index, WaitTime: wait})
		if err != nil {
			p.see("error %v", err)
			return nil, 0, 0
		}
		return pair, meta.LastIndex, time.Since(began)
	}
	const short, long = 400 * time.Millisecond, 30 * time.Second
	// during records what a blocking read of a key sees while the operations
	// are applied.
	during := func(what, key string, wait time.Duration, ops ...*api.KVTxnOp) {
		before, index, _ := get(key, 0, 0)
		done := make(chan struct{})
		time.AfterFunc(100*time.Millisecond, func() {
			defer close(done)
			var all api.TxnOps
			for _, op := range ops {
				all = append(all, &api.TxnOp{KV: op})
			}
			if _, _, _, err := p.client.Txn().Txn(all, nil); err != nil {
				p.Error(err)
			}
		})
		after, next, took := get(key, index, wait)
		<-done
		p.see("%s: there before %t, after %t, a later index %t, at once %t",
			what, before != nil, after != nil, next > index, took < wait)
	}
	p.txn(p.set("a", "1"), p.set("b", "1"))
	during("its value changes", "a", long, p.set("a", "2"))
	during("another key changes", "a", short, p.set("b", "2"))
	during("the same value is set", "a", short, p.set("a", "2"))
	during("it is deleted", "a", long, p.op(api.KVDelete, "a"))
	during("it is missing, another key changes", "a", short, p.set("b", "3"))
	during("it is created", "a", long, p.set("a", "3"))
	session := p.session(time.Nanosecond)
	p.txn(p.lock("l", session, "v"))
	during("the lock is released", "l", long, p.op(api.KVDelete, "l"))
	p.txn(p.set("t/a", "1"))
	during("its tree is deleted", "t/a", long, p.op(api.KVDeleteTree, "t/"))
}
