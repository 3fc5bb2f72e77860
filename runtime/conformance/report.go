package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Verdict says how a requirement ended.
type Verdict string

// The verdicts.
const (
	Pass Verdict = "PASS"
	Fail Verdict = "FAIL"
	Skip Verdict = "SKIP" // it does not apply, or cannot be checked here
)

// Result is what came of one requirement.
type Result struct {
	Name     string
	Requires string // what a driver must do
	Verdict  Verdict
	Reason   string // why it failed or was skipped; may be of several lines
	Took     time.Duration
}

// Verify runs the suite and prints the verdict on each requirement as it comes,
// and a summary. ok says that none failed. The error is that of ctx, where it
// ended the suite early, or of out.
func Verify(ctx context.Context, h Harness, out io.Writer) (ok bool, err error) {
	count := map[Verdict]int{}
	began := time.Now()
	for _, r := range requirements() {
		result := r.try(ctx, h)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		count[result.Verdict]++
		if err := result.print(out); err != nil {
			return false, err
		}
	}
	_, err = fmt.Fprintf(out, "\n%d passed, %d failed, %d skipped in %.1f s\n",
		count[Pass], count[Fail], count[Skip], time.Since(began).Seconds())
	return count[Fail] == 0, err
}

func (r Result) print(out io.Writer) error {
	var text strings.Builder
	_, _ = fmt.Fprintf(&text, "%s  %6.2f s  %s\n                required: %s\n", r.Verdict, r.Took.Seconds(), r.Name, r.Requires)
	if r.Reason != "" {
		label := map[Verdict]string{Fail: "but", Skip: "skipped"}[r.Verdict]
		_, _ = fmt.Fprintf(&text, "                %s: %s\n", label, strings.ReplaceAll(r.Reason, "\n", "\n                  "))
	}
	_, err := io.WriteString(out, text.String())
	return err
}

// try checks the requirement on a driver of its own.
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
