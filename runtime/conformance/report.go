package conformance

import (
	"context"
	"errors"
	"iter"
	"regexp"
	"time"
)

// Verdict is the result of a requirement.
type Verdict string

// These are the verdicts.
const (
	Pass Verdict = "PASS"
	Fail Verdict = "FAIL"
	Skip Verdict = "SKIP" // it does not apply, or cannot be checked here
)

// Result is the result of one requirement.
type Result struct {
	Name     string
	Requires string // what a driver must do
	Verdict  Verdict
	Reason   string // why it failed or was skipped; may have several lines
	Took     time.Duration
}

// Verify runs the suite and yields the result of each requirement as soon as it
// is known. With a pattern, it runs only the requirements whose names match. It
// stops when ctx is done.
func Verify(ctx context.Context, h Harness, pattern *regexp.Regexp) iter.Seq[Result] {
	return func(yield func(Result) bool) {
		for _, r := range requirements() {
			if pattern != nil && !pattern.MatchString(r.name) {
				continue
			}
			if result := r.try(ctx, h); ctx.Err() != nil || !yield(result) {
				return
			}
		}
	}
}

// try checks the requirement with a newly opened driver.
func (r requirement) try(ctx context.Context, h Harness) Result {
	began := time.Now()
	result := Result{Name: r.name, Requires: r.requires, Verdict: Pass}
	if reason := r.without(h); reason != "" {
		result.Verdict, result.Reason = Skip, reason
		return result
	}
	err := withFixture(ctx, h, r.check)
	if reason, skipped := errors.AsType[notApplicableError](err); skipped {
		result.Verdict, result.Reason = Skip, string(reason)
	} else if err != nil {
		result.Verdict, result.Reason = Fail, err.Error()
	}
	result.Took = time.Since(began)
	return result
}
