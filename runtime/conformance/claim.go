package conformance

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"sync"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

func requirementsOfClaim() []requirement {
	return []requirement{
		{"starts a spare", "Create of a spec with a pool returns a sandbox that answers, has the pool and no chat; Inspect and List show the same, and Info returns a Variant that stays", nothing, startsASpare},
		{"gives a spare to a chat", "Claim returns the spare with the chat; Inspect and List show that, or the spare as it was before", nothing, givesToAChat},
		{"binds the volume of a claim", "the claimed sandbox finds the chat's volume at BIVOUAC_WORKSPACE, and its chat and agent in BIVOUAC_SESSION_FILE, neither of which it had before", needsDemoToTell, bindsTheVolume},
		{"runs commands in a claimed sandbox", "a command finds the chat's volume at BIVOUAC_WORKSPACE, has BIVOUAC_SESSION_FILE and no BIVOUAC_CHAT_ID and BIVOUAC_AGENT_ID", needsDemoToRun, runsInTheClaimed},
		{"claims once however often it is asked", "a repeated Claim returns the same sandbox", nothing, claimsOnce},
		{"refuses a second chat", "Claim of a claimed sandbox with another chat, agent or volume returns ErrConflict and changes nothing", nothing, refusesASecondChat},
		{"gives a spare to one of many", "of concurrent Claims of one spare for ten chats one succeeds, and the others return ErrConflict", nothing, givesToOneOfMany},
		{"claims only spares", "Claim returns ErrNotFound for an unknown ID, and ErrConflict for a stopped spare and for a sandbox that was created for a chat", nothing, claimsOnlySpares},
		{"claims nothing that is dead", "Claim of a spare that ended by itself returns ErrNotReady", needsKill, claimsNothingDead},
		{"ends what was claimed", "Stop and Delete of a spare, claimed or not, leave nothing but the volume, and Claim and Create then fail", nothing, endsTheClaimed},
		{"keeps claims over a restart", "spares and claimed sandboxes keep running, the driver finds them again, and knows who has claimed them", needsReopen, keepsClaims},
	}
}

const errNoClaim = notApplicableError("the driver has no Claim, which it need not have")

// claim calls Claim, if the driver has it.
func (f *fixture) claim(spec runtime.Spec) (runtime.Sandbox, error) {
	return f.claimIn(f.patience(), spec)
}

// claimIn calls Claim as claim does. It may be called from any goroutine.
func (f *fixture) claimIn(ctx context.Context, spec runtime.Spec) (runtime.Sandbox, error) {
	claimer, ok := f.driver.(runtime.Claimer)
	if !ok {
		return runtime.Sandbox{}, errNoClaim
	}
	sandbox, err := claimer.Claim(ctx, spec)
	if errors.Is(err, errors.ErrUnsupported) {
		return runtime.Sandbox{}, errNoClaim
	}
	return sandbox, err
}

// spare is a running spare.
type spare struct {
	spec    runtime.Spec // with which it was created
	claim   runtime.Spec // with which a chat may claim it
	sandbox runtime.Sandbox
}

// spare creates a spare. The check does not apply if the driver has no Claim, which is
// asked first, because such a driver need not know what a spare is.
func (f *fixture) spare() spare {
	claim := f.spec()
	if _, err := f.claim(claim); errors.Is(err, errNoClaim) {
		f.fail(errNoClaim)
	}
	s := spare{claim: claim, spec: runtime.Spec{
		SessionID: claim.SessionID, Pool: "conformance", CreatedAt: claim.CreatedAt, ExpiresAt: claim.ExpiresAt, AccessToken: claim.AccessToken,
	}}
	s.sandbox = f.create(s.spec)
	return s
}

// claimed creates a spare and claims it.
func (f *fixture) claimed() (spare, runtime.Sandbox) {
	s := f.spare()
	sandbox, err := f.claim(s.claim)
	f.noError(err, "Claim")
	f.serves(s, sandbox)
	return s, sandbox
}

// serves checks that a claimed sandbox is the spare, has the chat, and answers.
func (f *fixture) serves(s spare, sandbox runtime.Sandbox) {
	same(f, s.claim.SessionID, sandbox.SessionID, "the session of a claimed sandbox")
	same(f, s.claim.ChatID, sandbox.ChatID, "the chat of a claimed sandbox")
	same(f, runtime.StateRunning, sandbox.State, "the state of a claimed sandbox")
	same(f, s.sandbox.ContainerID, sandbox.ContainerID, "the container of a claimed sandbox")
	same(f, s.sandbox.Endpoint, sandbox.Endpoint, "the endpoint of a claimed sandbox")
	f.require(f.answers(sandbox.Endpoint), "a claimed sandbox does not answer at %s", sandbox.Endpoint.AddrPort())
}

// shows checks what Inspect and List show of a claimed sandbox. A driver that cannot
// describe a sandbox anew shows the spare as it was.
func (f *fixture) shows(s spare, sandbox runtime.Sandbox) {
	for what, seen := range map[string]runtime.Sandbox{"Inspect": f.inspect(s.claim), "List": f.listed(s.claim)[s.claim.SessionID]} {
		f.require(reflect.DeepEqual(seen, sandbox) || reflect.DeepEqual(seen, s.sandbox),
			"%s shows of a claimed sandbox %+v, and must show what Claim returned, %+v, or the spare as it was, %+v", what, seen, sandbox, s.sandbox)
	}
}

// isSpare checks that the sandbox is a spare that answers, as Create, Inspect and List
// show it.
func (f *fixture) isSpare(s spare) {
	same(f, s.spec.SessionID, s.sandbox.SessionID, "the session of a spare")
	same(f, s.spec.Pool, s.sandbox.Pool, "the pool of a spare")
	same(f, "", s.sandbox.ChatID, "the chat of a spare")
	same(f, runtime.StateRunning, s.sandbox.State, "the state of a spare")
	same(f, "", s.sandbox.Reason, "the reason of a spare, for which the host would end it")
	f.require(s.sandbox.ContainerID != "", "a spare has no container ID")
	f.require(s.sandbox.Endpoint.IsValid(), "a spare has no endpoint")
	f.require(f.answers(s.sandbox.Endpoint), "a spare does not answer at %s", s.sandbox.Endpoint.AddrPort())
	same(f, s.sandbox, f.inspect(s.spec), "what Inspect shows of a spare")
	same(f, s.sandbox, f.listed(s.spec)[s.spec.SessionID], "what List shows of a spare")
}

func startsASpare(f *fixture) {
	s := f.spare()
	f.isSpare(s)
	same(f, s.sandbox, f.create(s.spec), "what a repeated Create of a spare returns")
	variant := f.variant()
	f.require(variant != "" && len(variant) <= 64, "its variant has %d bytes, and must have 1 to 64", len(variant))
	for _, c := range []byte(variant) {
		f.require(' ' <= c && c <= '~', "its variant %q is not printable ASCII", variant)
	}
	same(f, variant, f.variant(), "the variant that Info returns later")
}

func (f *fixture) variant() string {
	info, err := f.driver.Info(f.patience())
	f.noError(err, "Info")
	return info.Variant
}

func givesToAChat(f *fixture) {
	s, sandbox := f.claimed()
	f.shows(s, sandbox)
	other := f.spare()
	f.isSpare(other)
	f.shows(s, sandbox)
}

func bindsTheVolume(f *fixture) {
	s := f.spare()
	f.wasTold(s.spec, s.sandbox)
	sandbox, err := f.claim(s.claim)
	f.noError(err, "Claim")
	f.wasToldTruth(s.claim, sandbox)
	f.stop(s.claim)
	f.isSilent(s.spec.SessionID, sandbox.Endpoint)
}

func runsInTheClaimed(f *fixture) {
	s, sandbox := f.claimed()
	f.needsExec()
	g := f.guestIn(s.claim, sandbox)
	environment := g.run(g.command("env=BIVOUAC_SESSION_ID env=BIVOUAC_CHAT_ID env=BIVOUAC_AGENT_ID env=BIVOUAC_SESSION_FILE"), nil)
	file, isRight := strings.CutPrefix(environment.stdout, s.claim.SessionID+"\n\n\n")
	f.require(isRight, "the session, chat and agent in the environment of a command are %q, and must be that of the session alone", environment.stdout)
	f.require(strings.TrimSpace(file) != "", "a command in a claimed sandbox has no BIVOUAC_SESSION_FILE")
	ctx, cancel := context.WithCancel(f.patience())
	defer cancel()
	r := g.begin(ctx) // it locks files of the volume
	cancel()
	f.isError(g.areKilled(r), context.Canceled, "Exec whose context ended")
}

func claimsOnce(f *fixture) {
	s, sandbox := f.claimed()
	again, err := f.claim(s.claim)
	f.noError(err, "a repeated Claim")
	same(f, sandbox, again, "what a repeated Claim returns")
	f.shows(s, sandbox)
}

func refusesASecondChat(f *fixture) {
	s, sandbox := f.claimed()
	for name, change := range map[string]func(*runtime.Spec){
		"chat":   func(c *runtime.Spec) { c.ChatID = uuid.NewString() },
		"agent":  func(c *runtime.Spec) { c.AgentID = "agent-2" },
		"volume": func(c *runtime.Spec) { c.VolumeHostPath = f.volume() },
	} {
		other := s.claim
		change(&other)
		_, err := f.claim(other)
		f.isError(err, runtime.ErrConflict, "Claim with another "+name)
		f.shows(s, sandbox)
		if f.harness.Demo {
			f.wasToldTruth(s.claim, sandbox)
		}
	}
}

func givesToOneOfMany(f *fixture) {
	const many = 10
	s := f.spare()
	var claims [many]runtime.Spec
	var sandboxes [many]runtime.Sandbox
	var errs [many]error
	for i := range claims {
		claims[i] = s.claim
		claims[i].ChatID, claims[i].VolumeHostPath = uuid.NewString(), f.volume()
	}
	var all sync.WaitGroup
	ctx := f.patience()
	for i := range claims {
		all.Go(func() { sandboxes[i], errs[i] = f.claimIn(ctx, claims[i]) })
	}
	all.Wait()
	won := 0
	for i, err := range errs {
		if err != nil {
			f.isError(err, runtime.ErrConflict, "Claim beside others")
			continue
		}
		won++
		s.claim = claims[i]
		f.serves(s, sandboxes[i])
		if f.harness.Demo {
			f.wasToldTruth(s.claim, sandboxes[i])
		}
	}
	same(f, 1, won, "chats that got the same spare")
}

func claimsOnlySpares(f *fixture) {
	stopped := f.spare()
	f.stop(stopped.claim)
	_, err := f.claim(stopped.claim)
	f.isError(err, runtime.ErrConflict, "Claim of a stopped spare")

	spec := f.spec()
	sandbox := f.create(spec)
	_, err = f.claim(spec)
	f.isError(err, runtime.ErrConflict, "Claim of a sandbox that was created for a chat")
	f.runs(spec, sandbox)

	s := f.spare()
	for _, unknown := range []string{uuid.NewString(), neighbour(s.spec.SessionID)} {
		claim := s.claim
		claim.SessionID = unknown
		_, err = f.claim(claim)
		f.isError(err, runtime.ErrNotFound, "Claim of an unknown ID")
	}
	f.isSpare(s)
}

func claimsNothingDead(f *fixture) {
	s := f.spare()
	f.kill(s.spec, s.sandbox)
	f.eventuallyDead(s.spec)
	_, err := f.claim(s.claim)
	f.isError(err, runtime.ErrNotReady, "Claim of a spare that has ended")
	f.delete(s.spec)
	f.isGone(s.spec)
}

func endsTheClaimed(f *fixture) {
	unclaimed := f.spare()
	stopped, _ := f.claimed()
	f.stop(stopped.claim)
	f.isDead(f.inspect(stopped.claim), stopped.sandbox.Endpoint)
	deleted, _ := f.claimed()
	for _, s := range []spare{unclaimed, stopped, deleted} {
		f.delete(s.claim)
		f.isGone(s.claim)
		f.isSilent(s.spec.SessionID, s.sandbox.Endpoint)
		f.refusesCreate(s.spec)
		_, err := f.claim(s.claim)
		f.require(err != nil, "Claim succeeds after a Delete")
		f.isGone(s.claim)
	}
	// The empty file that the suite has put into the volume is still there.
	if f.harness.Demo {
		for _, s := range []spare{stopped, deleted} {
			f.isFile(orderFile(s.claim))
		}
	}
}

func keepsClaims(f *fixture) {
	unclaimed := f.spare()
	s, sandbox := f.claimed()
	var err error
	f.driver, err = f.harness.Reopen(f.ctx, f.driver)
	f.noError(err, "restart the driver")
	f.isSpare(unclaimed)
	f.shows(s, sandbox)
	other := s.claim
	other.ChatID, other.VolumeHostPath = uuid.NewString(), f.volume()
	_, err = f.claim(other)
	f.isError(err, runtime.ErrConflict, "Claim for another chat after a restart")
	again, err := f.claim(s.claim)
	f.noError(err, "a repeated Claim after a restart")
	same(f, sandbox, again, "what a repeated Claim returns after a restart")
	if f.harness.Demo {
		f.wasToldTruth(s.claim, sandbox)
	}
	sandbox, err = f.claim(unclaimed.claim)
	f.noError(err, "Claim after a restart")
	f.serves(unclaimed, sandbox)
	for _, ended := range []spare{s, unclaimed} {
		f.stop(ended.claim)
		f.isDead(f.inspect(ended.claim), ended.sandbox.Endpoint)
		f.delete(ended.claim)
		f.isGone(ended.claim)
	}
}
