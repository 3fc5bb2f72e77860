package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// row is one line of the report. Times are in milliseconds. A field that does
// not apply is zero.
type row struct {
	Part  string             `json:"part"`
	What  string             `json:"what"`
	N     int                `json:"n"`
	P50   float64            `json:"p50_ms,omitempty"`
	P90   float64            `json:"p90_ms,omitempty"`
	P99   float64            `json:"p99_ms,omitempty"`
	Count float64            `json:"count,omitempty"` // in Unit
	Unit  string             `json:"unit,omitempty"`
	Ratio map[string]float64 `json:"ratio,omitempty"` // ratio of this row to another, by p50 or count
	// Target is what the ratio to another row should be: at most that for times, at least
	// that for rates.
	Target map[string]float64 `json:"target,omitempty"`
	// Limit is what a percentile or the count should be at most, by its column.
	Limit map[string]float64 `json:"limit,omitempty"`
}

type report []row

// timed makes a row from measured durations.
func timed(part, what string, took []time.Duration) row {
	slices.Sort(took)
	return row{Part: part, What: what, N: len(took),
		P50: percentile(took, 50), P90: percentile(took, 90), P99: percentile(took, 99)}
}

// percentile returns a percentile of sorted durations in milliseconds, by the
// nearest-rank method.
func percentile(sorted []time.Duration, p int) float64 {
	if len(sorted) == 0 {
		return 0
	}
	rank := (len(sorted)*p + 99) / 100
	return float64(sorted[max(rank, 1)-1].Nanoseconds()) / 1e6
}

// against adds the ratios of the row to other rows.
func (r *row) against(others ...row) {
	if r.Ratio == nil {
		r.Ratio = make(map[string]float64)
	}
	for _, o := range others {
		switch {
		case o.P50 > 0:
			r.Ratio[o.What] = r.P50 / o.P50
		case o.Count > 0:
			r.Ratio[o.What] = r.Count / o.Count
		}
	}
}

// aim sets the target of the ratio to another row.
func (r *row) aim(other string, target float64) {
	if r.Target == nil {
		r.Target = make(map[string]float64)
	}
	r.Target[other] = target
}

// limits describes the row's limits.
func (r row) limits() []string {
	var texts []string
	for _, column := range slices.Sorted(maps.Keys(r.Limit)) {
		limit := r.Limit[column]
		text := fmt.Sprintf("(target: %s at most %g", column, limit)
		if map[string]float64{"P50": r.P50, "P90": r.P90, "P99": r.P99, "COUNT": r.Count}[column] > limit {
			text += ", missed"
		}
		texts = append(texts, text+")")
	}
	return texts
}

// ratioTo describes the ratio to another row, and its target if there is one.
func (r row) ratioTo(other string) string {
	ratio := r.Ratio[other]
	text := fmt.Sprintf("%.2f × %s", ratio, other)
	target, ok := r.Target[other]
	if !ok {
		return text
	}
	bound, missed := "at most", ratio > target
	if r.P50 == 0 {
		bound, missed = "at least", ratio < target
	}
	text += fmt.Sprintf(" (target: %s %.2f", bound, target)
	if missed {
		text += ", missed"
	}
	return text + ")"
}

func (r report) print(out io.Writer) error {
	var lines strings.Builder
	w := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "PART\tWHAT\tN\tP50 ms\tP90 ms\tP99 ms\tCOUNT\tRATIO")
	for _, row := range r {
		count := ""
		if row.Unit != "" {
			count = fmt.Sprintf("%.2f %s", row.Count, row.Unit)
		}
		names := slices.Sorted(maps.Keys(row.Ratio))
		ratios := make([]string, len(names))
		for i, name := range names {
			ratios[i] = row.ratioTo(name)
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", row.Part, row.What, row.N,
			ms(row.P50), ms(row.P90), ms(row.P99), count, strings.Join(append(ratios, row.limits()...), ", "))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(lines.String()) {
		if _, err := fmt.Fprintln(out, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func ms(v float64) string {
	if v == 0 {
		return ""
	}
	if v < 0.1 {
		return fmt.Sprintf("%.4f", v)
	}
	return fmt.Sprintf("%.1f", v)
}
