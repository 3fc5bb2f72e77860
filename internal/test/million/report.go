package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// row is one line of the table: one measurement beside few sessions and beside many.
type row struct {
	what, unit string
	few, many  float64
	aim        *aim          // nil: there is no target
	requests   int64         // of the replica with many sessions to Consul, at p50; 0: none, or not counted
	longest    time.Duration // of the probe's writes meanwhile; 0: not measured
}

// aim is the target of a row.
type aim struct {
	most  float64
	ratio bool // of the ratio of many to few, else of many
}

func (a *aim) String() string {
	if a.ratio {
		return fmt.Sprintf("≤ %g ×", a.most)
	}
	return fmt.Sprintf("≤ %g", a.most)
}

// verdict says whether the row's target was met. It is empty if there is none.
func (r row) verdict() string {
	value := r.many
	switch {
	case r.aim == nil:
		return ""
	case r.aim.ratio:
		value = r.many / r.few
	}
	if value <= r.aim.most {
		return "met"
	}
	return "MISSED"
}

// print writes the table.
func printRows(out io.Writer, few, many int, rows []row) error {
	var lines strings.Builder
	w := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "WHAT\tUNIT\t%d\t%d\tRATIO\tTARGET\t\tCONSUL REQUESTS\tSLOWEST WRITE MEANWHILE\n", few, many)
	for _, r := range rows {
		ratio, target, requests, longest := "", "", "", ""
		if r.few > 0 {
			ratio = fmt.Sprintf("%.2f", r.many/r.few)
		}
		if r.aim != nil {
			target = r.aim.String()
		}
		if r.requests > 0 {
			requests = strconv.FormatInt(r.requests, 10)
		}
		if r.longest > 0 {
			longest = fmt.Sprintf("%.1f ms", ms(r.longest))
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.what, r.unit, number(r.few), number(r.many), ratio, target, r.verdict(), requests, longest)
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

func number(v float64) string {
	switch {
	case v == 0:
		return ""
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

const mb = 1 << 20

// median returns the median of numbers, or 0 if there are none. It sorts them.
func median(numbers []int64) int64 {
	if len(numbers) == 0 {
		return 0
	}
	slices.Sort(numbers)
	return numbers[len(numbers)/2]
}

// percentile returns a percentile of durations in milliseconds, by the nearest-rank
// method. It sorts them.
func percentile(took []time.Duration, p int) float64 {
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return ms(took[max((len(took)*p+99)/100, 1)-1])
}
