package conformance

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

func requirementsOfExplain() []requirement {
	return []requirement{
		{"explains what became of a sandbox", "Explain tells of a start and of an end, in their order", needsKill, explainsStartAndEnd},
		{"explains only what it knows", "Explain of an unknown ID returns ErrNotFound", nothing, explainsNothing},
	}
}

const errNoExplain = notApplicableError("the driver has no Explain, which it need not have")

// explain calls Explain, if the driver has it.
func (f *fixture) explain(sessionID string) ([]runtime.Happening, error) {
	explainer, ok := f.driver.(runtime.Explainer)
	if !ok {
		f.fail(errNoExplain)
	}
	happenings, err := explainer.Explain(f.patience(), sessionID)
	if errors.Is(err, errors.ErrUnsupported) {
		f.fail(errNoExplain)
	}
	return happenings, err
}

func explainsStartAndEnd(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	started := f.explained(spec)
	f.require(len(started) > 0, "Explain tells nothing of a sandbox that has started")
	f.kill(spec, sandbox)
	f.eventuallyDead(spec)
	f.eventually(f.soon(), "Explain to tell of the end of a sandbox", func() bool {
		ended := f.explained(spec)
		return len(ended) > 0 && ended[len(ended)-1] != started[len(started)-1]
	})
}

// explained returns what Explain tells of a sandbox.
func (f *fixture) explained(spec runtime.Spec) []runtime.Happening {
	happenings, err := f.explain(spec.SessionID)
	f.noError(err, "Explain")
	f.require(len(happenings) <= 100, "Explain tells %d things, and at most 100 are allowed", len(happenings))
	var times []time.Time
	for _, happening := range happenings {
		f.require(strings.TrimSpace(happening.Text) != "" && len(happening.Text) <= 4096,
			"Explain tells something in %d bytes, and must in 1 to 4096", len(happening.Text))
		if !happening.Time.IsZero() {
			times = append(times, happening.Time)
		}
	}
	f.require(slices.IsSortedFunc(times, time.Time.Compare), "Explain tells things out of order: %v", happenings)
	return happenings
}

func explainsNothing(f *fixture) {
	spec := f.spec()
	f.create(spec)
	for _, unknown := range []string{uuid.NewString(), neighbour(spec.SessionID)} {
		_, err := f.explain(unknown)
		f.isError(err, runtime.ErrNotFound, "Explain of an unknown ID")
	}
}

// eventually waits until done returns true, which must be soon enough.
func (f *fixture) eventually(limit time.Duration, what string, done func() bool) {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for !done() {
		select {
		case <-deadline.C:
			f.require(false, "waited %s in vain for %s", limit, what)
		case <-again.C:
		}
	}
}
