package pluginhost

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
	"github.com/shoenig/test/must"
)

func logged(t *testing.T) (*output, *journal) {
	t.Helper()
	log := &journal{}
	return newOutput(hclog.New(&hclog.LoggerOptions{Output: log, Level: hclog.Trace, DisableTime: true})), log
}

func TestOutput_KeepsLevelAndValues(t *testing.T) {
	for line, want := range map[string]string{
		`{"@level":"warn","@message":"low","@module":"docker","@timestamp":"2026-01-02T03:04:05.000000Z","left":3}`: "[WARN]  low: module=docker left=3\n",
		`{"@level":"loud","@message":"hm"}`: "[INFO]  hm\n",
		`{"@message":1}`:                    `[INFO]  {"@message":1}` + "\n",
		`{"level":"info"}`:                  `[INFO]  {"level":"info"}` + "\n",
		"[ERROR] no engine":                 "[ERROR] [ERROR] no engine\n",
		"panic: nil map":                    "[ERROR] panic: nil map\n",
		"plain\ttext \x1b[2J":               "[INFO]  plain text \uFFFD[2J\n",
		`{"@level":"error","@message":"no\nroom","error":"first:\r\n  second\n\nthird\n"}`: `[ERROR] no; room: error="first: second; third"` + "\n",
		"": "",
	} {
		out, log := logged(t)
		out.copy(strings.NewReader(line + "\n"))
		must.Eq(t, want, log.String())
	}
}

func TestOutput_CutsLongLines(t *testing.T) {
	out, log := logged(t)
	out.copy(strings.NewReader(strings.Repeat("x", 1<<20) + "\nnext\n"))
	must.Less(t, maxLine+100, len(log.String()))
	must.StrContains(t, log.String(), "[cut]\n")
	must.StrContains(t, log.String(), "[INFO]  next\n")
}

func TestOutput_DropsAFloodAndCountsIt(t *testing.T) {
	out, log := logged(t)
	now := time.Unix(1, 0)
	out.now = func() time.Time { return now }
	out.copy(strings.NewReader(strings.Repeat("flood\n", maxLines+7)))
	must.Eq(t, maxLines, strings.Count(log.String(), "flood\n"))
	must.StrContains(t, log.String(), outputDropNote+": lines=7\n")

	now = now.Add(outputWindow)
	out.copy(strings.NewReader("calm\n"))
	must.StrContains(t, log.String(), "[INFO]  calm\n")
}

func TestOutput_RemembersWhatAProgramDiedWith(t *testing.T) {
	out, _ := logged(t)
	out.copy(strings.NewReader("one\ntwo\n"))
	must.Eq(t, "one / two", out.last())
	out.copy(strings.NewReader("panic: nil map\n\ngoroutine 1 [running]:\n" + strings.Repeat("main.f()\n", 10)))
	must.Eq(t, "panic: nil map", out.last())
}

func FuzzOutput(f *testing.F) {
	for _, seed := range []string{`{"@message":1}`, `{"@message":"a","@level":"warn","k":[1,{"b":null}]}`, "panic: x", "\xff\x1b[31m"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		out, log := logged(t)
		out.copy(strings.NewReader(text))
		if _, err := fmt.Fprint(out, text); err != nil {
			t.Fatal(err)
		}
		if !utf8.ValidString(log.String()) || strings.ContainsRune(log.String(), '\x1b') || !utf8.ValidString(out.last()) {
			t.Fatalf("not fit for a log: %q", log.String())
		}
	})
}

func FuzzCheckHandshake(f *testing.F) {
	for _, seed := range []string{"1|1|unix|/tmp/x|grpc|", "1|1|tcp|127.0.0.1:80|grpc|AAAA", "||||||"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		if err := checkHandshake(line); err != nil && len(err.Error()) > 4096 {
			t.Fatalf("an error of %d bytes", len(err.Error()))
		}
	})
}
