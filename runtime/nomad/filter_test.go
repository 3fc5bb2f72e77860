package nomad

import (
	"bytes"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

func TestFilter(t *testing.T) {
	for name, tc := range map[string]struct {
		written []string
		want    string
		told    telling
	}{
		"passes_output_on_at_once":           {[]string{"out", "put"}, "output", telling{}},
		"takes_the_lines_of_the_wrapper_out": {[]string{"\x01MARK begin 12\nout\x01MARK end 3\n"}, "out", telling{pid: "12", code: 3, ends: 1}},
		"takes_lines_that_come_in_pieces":    {[]string{"out\x01MA", "RK beg", "in 12\r", "\nput"}, "output", telling{pid: "12"}},
		"passes_what_only_looks_like_a_line": {[]string{"\x01MARS", " begin 12\n"}, "\x01MARS begin 12\n", telling{}},
		"passes_nothing_on_after_the_end":    {[]string{"out\x01MARK end 3\nput", "more"}, "out", telling{code: 3, ends: 1}},
		"passes_a_line_that_is_too_long":     {[]string{"\x01MARK " + strings.Repeat("x", maxTold), "y"}, "\x01MARK " + strings.Repeat("x", maxTold) + "y", telling{}},
		"finds_a_line_after_one_that_is_not": {[]string{"\x01MARK " + strings.Repeat("x", maxTold+1), "\x01MARK begin 12\n"}, "\x01MARK " + strings.Repeat("x", maxTold+1), telling{pid: "12"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			told := telling{line: []byte("\x01MARK ")}
			f := newFilter(&told, &out)
			for _, text := range tc.written {
				must.NoError(t, f.write([]byte(text)))
			}
			must.Eq(t, tc.want, out.String())
			must.Eq(t, tc.told.pid, told.pid)
			must.Eq(t, tc.told.code, told.code)
			must.Eq(t, tc.told.ends, told.ends)
		})
	}
	t.Run("holds_little_back", func(t *testing.T) {
		told := telling{line: []byte("\x01MARK ")}
		f := newFilter(&told, nil)
		must.NoError(t, f.write([]byte("\x01MARK ")))
		for range 1000 {
			must.NoError(t, f.write([]byte(strings.Repeat("x", 1000))))
		}
		must.Less(t, 1000, len(f.held))
	})
}
