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
			ratios[i] = fmt.Sprintf("%.2f × %s", row.Ratio[name], name)
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", row.Part, row.What, row.N,
			ms(row.P50), ms(row.P90), ms(row.P99), count, strings.Join(ratios, ", "))
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
