package jobs

import (
	"regexp"
	"strings"
)

// Nomad's client interpolates env and meta values in one pass ("${name}" becomes
// the name's value, unknown names stay, there is no escape), and reads each
// string of a driver's config as an HCL template ("${" and "%{"). A session's
// value must pass through both unchanged.
//
// Both know the job's meta as NOMAD_META_…, and neither reads again what it put
// in. So a job whose session has such characters carries a "$" and a "%" in its
// meta, and values refer to those.
//
// Which characters came from a session is only known while the template is
// evaluated, and what needs protection only afterwards, when all parts of a
// string are together. In between, control characters, which a session's values
// cannot hold, stand in for "$" and "%".
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
	// signs are those in front of a brace, at least one of them a session's.
	// A row of them counts as one, since HCL reads "$${" and "%%{" as escapes.
	signs = regexp.MustCompile(`[$%\x01\x02]*[\x01\x02][$%\x01\x02]*\{`)
)

func standIn(s string) string { return standIns.Replace(s) }

// protected returns s in the form that arrives as it was meant after Nomad's
// interpolation. What the template's author wrote for Nomad to interpolate
// stays so.
func protected(s string) string {
	return originals.Replace(signs.ReplaceAllStringFunc(s, func(row string) string {
		opening := len(row) - 1 // of the brace, and of the author's sign before it
		if row[opening-1] == '$' || row[opening-1] == '%' {
			opening--
		}
		return references.Replace(row[:opening]) + row[opening:]
	}))
}
