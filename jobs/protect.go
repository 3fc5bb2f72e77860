package jobs

import (
	"regexp"
	"strings"
)

// A Nomad client interpolates env and meta values in one pass: "${name}" becomes
// the name's value, unknown names stay, and there is no escape. It also parses
// each string of a driver's config as an HCL template ("${" and "%{"). A session's
// value must pass through both unchanged.
//
// Both offer the job's meta as NOMAD_META_…, and neither parses an inserted value
// again. So if a session has such characters, its job has a "$" and a "%" in its
// meta, and the job's values refer to those.
//
// Only the evaluation of the template knows which characters came from a session.
// What needs protection is known only afterwards, when all parts of a string are
// joined. In between, control characters replace a session's "$" and "%". A
// session's values cannot contain control characters.
const (
	dollarStandIn  = "\x01"
	percentStandIn = "\x02"

	metaDollar  = "BIVOUAC_DOLLAR"
	metaPercent = "BIVOUAC_PERCENT"

	dollarRef  = "${NOMAD_META_" + metaDollar + "}"
	percentRef = "${NOMAD_META_" + metaPercent + "}"
)

var (
	standIns   = strings.NewReplacer("$", dollarStandIn, "%", percentStandIn)
	originals  = strings.NewReplacer(dollarStandIn, "$", percentStandIn, "%")
	references = strings.NewReplacer(
		dollarStandIn, dollarRef, "$", dollarRef,
		percentStandIn, percentRef, "%", percentRef,
	)
	// signs matches the signs before a brace if at least one came from a session.
	// A row of signs is one match, because HCL reads "$${" and "%%{" as escapes.
	signs = regexp.MustCompile(`[$%\x01\x02]*[\x01\x02][$%\x01\x02]*\{`)
)

func standIn(s string) string { return standIns.Replace(s) }

// protected returns s in a form whose session values are unchanged after Nomad's
// interpolation. What the template's author wrote for Nomad to interpolate stays.
func protected(s string) string {
	return originals.Replace(signs.ReplaceAllStringFunc(s, func(row string) string {
		opening := len(row) - 1 // index of the brace, or of the author's sign before it
		if row[opening-1] == '$' || row[opening-1] == '%' {
			opening--
		}
		return references.Replace(row[:opening]) + row[opening:]
	}))
}
