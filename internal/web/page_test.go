package web_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"image/png"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"
	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/browser"
	"github.com/bivouac/bivouac/scheduler"
)

// go test ./internal/web -run Screenshot -update
var update = flag.Bool("update", false, "write the screenshot of the README again")

// TestPage uses the page as a person does, in a real browser, on a real server.
func TestPage(t *testing.T) {
	b := browser.Start(t)
	s := startDev(t, "")

	t.Run("shows a new session within a second and without a reload", func(t *testing.T) {
		p := b.Open(t, s.url+"/ui/", browser.Desktop())
		p.WaitText("#live", "Live")
		browser.Evaluate[bool](p, "window.sameDocument = true")
		idle := browser.Evaluate[float64](p, `(async () => {
			const began = performance.now();
			await (await fetch("/v1/sessions")).json();
			return performance.now() - began;
		})()`)

		created := s.create("fresh", nil)
		began := time.Now()
		p.WaitText("#sessions", created.ChatID.String())
		// On a busy machine everything takes longer, also a request by itself.
		must.Less(t, time.Second+10*time.Duration(idle*float64(time.Millisecond)), time.Since(began))
		must.True(t, browser.Evaluate[bool](p, "window.sameDocument"))
		p.WaitText("ol.latest", "fresh")
	})

	t.Run("shows that a sandbox died, and why", func(t *testing.T) {
		created := s.create("doomed", map[string]string{"ticket": "4711"})
		p := b.Open(t, s.url+"/ui/", browser.Desktop())
		p.WaitText("#sessions", created.ChatID.String())
		s.kill(created)
		p.Wait(fmt.Sprintf(`[...document.querySelectorAll("#sessions tr")].some((row) =>
			row.innerText.includes(%q) && row.innerText.includes("dead") && row.innerText.includes("killed by signal 9"))`, created.ChatID))

		p.Click(`#sessions a[href$="` + created.ChatID.String() + `"]`)
		for _, text := range []string{"dead", "killed by signal 9", "doomed", "ticket=4711", created.SessionID.String()} {
			p.WaitText("dl.facts", text)
		}
		p.WaitText("section[aria-labelledby=why]", "killed by signal 9")
		p.WaitText("section[aria-labelledby=timeline]", "dead")
		p.WaitText("section[aria-labelledby=timeline]", "created")
	})

	t.Run("shows the pools, and that a sandbox was a spare", func(t *testing.T) {
		p := b.Open(t, s.url+"/ui/#/server", browser.Desktop())
		p.Wait(`/dev\s+process\s+2\s+\d/.test(document.querySelector("section[aria-labelledby=pools]")?.innerText)`)
		created := s.create("warm", nil)
		for !created.Warm { // until the pool is full
			created = s.create("warm", nil)
		}
		p.Go(s.url + "/ui/#/sessions/" + created.ChatID.String())
		p.Wait(`/Warm start\s+yes/.test(document.querySelector("dl.facts")?.innerText)`)
		p.Click("main > p > a") // to all sessions
		p.Wait(fmt.Sprintf(`[...document.querySelectorAll("#sessions tr")].some((row) =>
			row.innerText.includes(%q) && row.innerText.includes("process, warm"))`, created.ChatID))
	})

	t.Run("deletes a session after a confirmation", func(t *testing.T) {
		created := s.create("unwanted", nil)
		p := b.Open(t, s.url+"/ui/#/sessions/"+created.ChatID.String(), browser.Desktop())
		p.Click("main > p > button.danger")
		p.WaitText("dialog", created.ChatID.String())
		p.WaitText("dialog", "unwanted")
		p.Click("dialog button:not(.danger)")
		p.Wait("!document.querySelector('dialog')")
		_, _, err := s.api.Get(t.Context(), created.ChatID, apiclient.Block{})
		must.NoError(t, err)

		p.Click("main > p > button.danger")
		p.Click("dialog button.danger")
		p.WaitText("main", "This chat has no session now.")
		p.Wait("document.querySelector('main > p > button.danger').hidden")
		_, _, err = s.api.Get(t.Context(), created.ChatID, apiclient.Block{})
		e, _ := errors.AsType[*apiclient.Error](err)
		must.NotNil(t, e)
		must.Eq(t, wire.CodeNotFound, e.Code)
	})

	t.Run("filters by agent, state and text, and keeps that in its address", func(t *testing.T) {
		first := s.create("filter-1", map[string]string{"ticket": "one"})
		second := s.create("filter-2", map[string]string{"ticket": "two"})
		shows := func(p *browser.Page, here, away wire.Session) {
			t.Helper()
			p.Wait(fmt.Sprintf(`document.querySelector("#sessions").innerText.includes(%q) && !document.querySelector("#sessions").innerText.includes(%q)`,
				here.ChatID, away.ChatID))
		}
		p := b.Open(t, s.url+"/ui/", browser.Desktop())
		p.WaitText("#sessions", first.ChatID.String())
		p.Click("#agent")
		p.Type("filter-1")
		shows(p, first, second)
		p.WaitText(".states button", "all 1")
		p.Go(s.url + "/ui/#/sessions?text=TICKET%3Dtwo")
		shows(p, second, first)
		p.Wait(`document.querySelector("#text").value === "TICKET=two"`)
		p.Click(".states button:nth-child(5)") // dead
		p.WaitText("main", "No session matches.")
		p.Wait(`location.hash.includes("state=dead") && location.hash.includes("text=TICKET")`)
	})

	t.Run("shows the state of the server", func(t *testing.T) {
		p := b.Open(t, s.url+"/ui/#/server", browser.Desktop())
		p.WaitText("section[aria-labelledby=health]", "sessions")
		p.WaitText("section[aria-labelledby=creates]", "p99 of a create")
		p.Wait(`/^Starts\s+\d+\s+[1-9]/m.test(document.querySelector("section[aria-labelledby=creates]").innerText)`)
		p.WaitText("section[aria-labelledby=refusals]", "refused no request")
		p.WaitText("section[aria-labelledby=parts]", "process")
	})

	t.Run("can be used with the keyboard alone", func(t *testing.T) {
		created := s.create("by-keyboard", nil)
		p := b.Open(t, s.url+"/ui/#/sessions?agent_id=by-keyboard", browser.Desktop())
		p.WaitText("#sessions", created.ChatID.String())
		p.Wait(`/1\s*$/.test(document.querySelector(".states button").innerText)`) // the counts may be older
		for _, want := range []string{
			"a Skip to the content", "a Sessions", "a Server", "input ID of the AI agent", "input Text in chat, agent, label or reason",
			"button all 1", "button creating 0", "button running 1", "button stopping 0", "button dead 0", "button lost 0",
			"a " + created.ChatID.String(),
		} {
			p.Type(kb.Tab)
			must.Eq(t, want, p.Focused())
			must.Positive(t, browser.Evaluate[float64](p, "parseFloat(getComputedStyle(document.activeElement).outlineWidth)"),
				must.Sprintf("%s shows that it has the focus", want))
		}
		p.Type(kb.Enter)
		p.WaitText("h1", created.ChatID.String())
		must.Eq(t, "h1 Session of chat "+created.ChatID.String(), p.Focused())
		p.Wait("!document.querySelector('main > p > button.danger').hidden")
		p.Type(kb.Tab)
		must.Eq(t, "button Delete the session", p.Focused())
		p.Type(kb.Enter)
		must.Eq(t, "button Keep it", p.Focused())
		p.Type(kb.Escape)
		p.Wait("!document.querySelector('dialog')")
		must.Eq(t, "button Delete the session", p.Focused())
		p.Type(kb.Enter)
		p.Type(kb.Tab)
		must.Eq(t, "button Delete it", p.Focused())
		p.Type(kb.Enter)
		p.WaitText("main", "This chat has no session now.")
		p.Wait(`document.querySelector("#announcement").innerText !== ""`)
	})

	t.Run("fits on a phone, in dark and in light, with contrast", func(t *testing.T) {
		long := strings.Repeat("long-name-", 10)
		created := s.create(long, map[string]string{"key": strings.Repeat("value", 50)})
		s.kill(s.create(long, nil))
		for _, size := range []browser.Size{browser.Phone(), browser.Desktop()} {
			p := b.Open(t, s.url+"/ui/", size)
			for _, scheme := range []string{"dark", "light"} {
				p.Prefer("prefers-color-scheme", scheme)
				for view, shown := range map[string]string{
					"#/sessions": "#sessions td", "#/server": "section[aria-labelledby=parts] td",
					"#/sessions/" + created.ChatID.String(): "section[aria-labelledby=logs] pre",
				} {
					p.Go(s.url + "/ui/" + view)
					p.Wait(fmt.Sprintf("document.querySelector(%q)", shown))
					must.True(t, browser.Evaluate[bool](p, "document.scrollingElement.scrollWidth <= document.scrollingElement.clientWidth"),
						must.Sprintf("%s needs no horizontal scrolling at %d pixels", view, size.Width))
					must.SliceEmpty(t, lowContrast(p), must.Sprintf("%s in %s", view, scheme))
				}
			}
		}
	})
}

// lowContrast returns the texts of a page whose contrast is below what WCAG 2 asks for at
// level AA.
func lowContrast(p *browser.Page) []string {
	return browser.Evaluate[[]string](p, `(() => {
		const rgba = (text) => text.match(/[\d.]+/g).map(Number);
		const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => {
			const v = c[i] / 255;
			return sum + part * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
		}, 0);
		const back = (node) => {
			for (; node; node = node.parentElement) {
				const c = rgba(getComputedStyle(node).backgroundColor);
				if (c[3] !== 0) return c;
			}
			return [255, 255, 255];
		};
		document.getAnimations().forEach((a) => a.finish());
		return [...document.querySelectorAll("body *")].filter((node) =>
			node.checkVisibility() && !node.disabled && [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim())
		).filter((node) => {
			const [a, b] = [light(rgba(getComputedStyle(node).color)), light(back(node))].sort((x, y) => y - x);
			return (a + 0.05) / (b + 0.05) < 4.5;
		}).map((node) => node.localName + "." + node.className + ": " + node.innerText);
	})()`)
}

// kill kills the process of a sandbox.
func (s *devServer) kill(session wire.Session) {
	s.t.Helper()
	pid, err := strconv.Atoi(session.ContainerID)
	must.NoError(s.t, err)
	must.NoError(s.t, syscall.Kill(pid, syscall.SIGKILL))
}

// hostile is text that would run if the page took it for markup.
const hostile = `<img src=x onerror="window.ran=1"><script>window.ran=1</script><a href="javascript:window.ran=1">"'&`

// TestPage_shows_text_as_text has a session whose fields are all hostile, except for those
// that are UUIDs.
func TestPage_shows_text_as_text(t *testing.T) {
	b := browser.Start(t)
	f := newFixture(t)
	session := f.put(func(s *scheduler.Session) {
		s.AgentID, s.Reason, s.Owner, s.Runtime = "agent "+hostile, "reason "+hostile, "owner "+hostile, "runtime "+hostile
		s.Labels = map[string]string{"label": hostile}
		s.VolumeHostPath, s.ContainerID = "/volume "+hostile, "container "+hostile
	})
	for view, fields := range map[string][]string{
		"#/sessions":                            {"agent ", "reason ", "runtime ", "label="},
		"#/sessions/" + session.ChatID.String(): {"agent ", "reason ", "runtime ", "label=", "owner ", "/volume ", "container "},
		"#/sessions?text=" + strings.ReplaceAll(`%3Cimg%20src=x%20onerror=alert(1)%3E`, " ", "%20"): nil,
		"#/sessions/" + `%3Cimg%20src=x%20onerror=alert(1)%3E`:                                      nil,
	} {
		t.Run(view, func(t *testing.T) {
			p := b.Open(t, f.url+"/ui/"+view, browser.Desktop())
			for _, field := range fields {
				p.WaitText("main", field+hostile)
			}
			p.Wait("document.querySelector('main').children.length > 3")
			must.True(t, browser.Evaluate[bool](p, `window.ran === undefined && !document.querySelector("main img, main script, main a[href^='javascript']")`))
		})
	}
}

func TestPage_asks_for_a_token(t *testing.T) {
	b := browser.Start(t)
	s := startDev(t, tokens)
	s.api = s.api.WithToken("all-rights-0123456789abcdef0123456789")
	created := s.create("researcher", nil)
	hidden := s.create("other", nil)
	signIn := func(t *testing.T, token string) *browser.Page {
		t.Helper()
		p := b.Open(t, s.url+"/ui/", browser.Desktop())
		p.WaitText("main", "This server needs a token.")
		must.Eq(t, "input Token", p.Focused())
		p.Type(token + kb.Enter)
		return p
	}

	t.Run("and works with it", func(t *testing.T) {
		p := signIn(t, "all-rights-0123456789abcdef0123456789")
		p.WaitText("#sessions", created.ChatID.String())
		p.WaitText("#live", "Live")
		must.Eq(t, "", browser.Evaluate[string](p, `document.cookie + Object.keys(localStorage) + Object.keys(sessionStorage) + location.search + location.hash`),
			must.Sprint("the token is only in the memory of the tab"))
		p.Click("#forget")
		p.WaitText("main", "This server needs a token.")
	})
	t.Run("and for another one if it is wrong", func(t *testing.T) {
		p := signIn(t, "wrong")
		p.WaitText("main [role=alert]", "no valid credentials")
		p.Type("all-rights-0123456789abcdef0123456789" + kb.Enter)
		p.WaitText("#sessions", created.ChatID.String())
	})
	t.Run("and says in words what a reader may not do", func(t *testing.T) {
		p := signIn(t, "may-read-0123456789abcdef0123456789ab")
		p.WaitText("#sessions", created.ChatID.String())
		p.WaitText(".states button", "all 1")
		must.StrNotContains(t, p.Text("main"), hidden.ChatID.String())
		p.Click(`#sessions a[href$="` + created.ChatID.String() + `"]`)
		p.WaitText("section[aria-labelledby=logs]", `it needs a policy with the capability "logs"`)
		must.True(t, browser.Evaluate[bool](p, "document.querySelector('main > p > button.danger').hidden"))
		p.Click("nav a[href='#/server']")
		p.WaitText("section[aria-labelledby=health]", `Details need a policy with operator = "read".`)
		p.WaitText("section[aria-labelledby=creates]", `This needs a policy with metrics = "read".`)
		p.WaitText("section[aria-labelledby=parts]", `Your token does not allow this`)
		p.Click("nav a[href='#/sessions']")
		p.WaitText("#sessions", created.ChatID.String())
		p.Click("#agent")
		p.Type("other")
		p.WaitText("main .failure", "Your token does not allow this")
	})
	t.Run("and shows a session of others as none", func(t *testing.T) {
		p := signIn(t, "may-read-0123456789abcdef0123456789ab")
		p.WaitText("#sessions", created.ChatID.String())
		browser.Evaluate[string](p, fmt.Sprintf("location.hash = '#/sessions/%s'", hidden.ChatID))
		p.WaitText("main", "This chat has no session now.")
		must.StrNotContains(t, p.Text("main"), "other")
	})
}

// TestPage_is_quick_with_50000_sessions compares with a server that has 100.
func TestPage_is_quick_with_50000_sessions(t *testing.T) {
	b := browser.Start(t)
	measure := func(n int) (paint, filter time.Duration) {
		f := newFixture(t)
		f.fill(n)
		p := b.Open(t, f.url+"/ui/", browser.Desktop())
		p.WaitText("#sessions", "agent-")
		p.WaitText(".states button", "all")
		fastest := func(run func()) time.Duration {
			least := time.Hour
			for range 5 {
				began := time.Now()
				run()
				least = min(least, time.Since(began))
			}
			return least
		}
		paint = fastest(func() {
			browser.Evaluate[string](p, "document.querySelector('#sessions tbody').replaceChildren() ?? ''")
			p.Go(f.url + "/ui/?" + uuid.NewString())
			p.WaitText("#sessions", "agent-")
		})
		rows := 0
		filter = fastest(func() {
			rows++
			browser.Evaluate[string](p, fmt.Sprintf("location.hash = '#/sessions?text=ticket%%3D%d'", rows))
			p.Wait(fmt.Sprintf(`document.querySelector("#sessions tbody")?.innerText.includes("ticket=%d") && document.querySelectorAll("#sessions tbody tr").length <= 50`, rows))
		})
		return paint, filter
	}
	many := 50_000
	if testing.Short() {
		many = 5_000
	}
	paint, filter := measure(100)
	manyPaint, manyFilter := measure(many)
	t.Logf("100 sessions: first paint %s, filter %s; %d sessions: %s, %s", paint, filter, many, manyPaint, manyFilter)
	must.Less(t, 10*paint, manyPaint)
	must.Less(t, 20*filter, manyFilter)
}

// TestPage_reads_the_list_twice_a_second_at_most writes 200 sessions in two seconds.
func TestPage_reads_the_list_twice_a_second_at_most(t *testing.T) {
	b := browser.Start(t)
	f := newFixture(t)
	p := b.Open(t, f.url+"/ui/", browser.Desktop())
	p.WaitText("#live", "Live")
	reads := func() int {
		return browser.Evaluate[int](p, `performance.getEntriesByType("resource").filter((entry) => entry.name.includes("/v1/sessions?")).length`)
	}
	before, began := reads(), time.Now()
	next := time.NewTicker(10 * time.Millisecond)
	defer next.Stop()
	for i := range 200 {
		f.put(func(s *scheduler.Session) { s.AgentID = fmt.Sprintf("burst-%d", i) })
		<-next.C
	}
	p.WaitText("ol.latest", "burst-199")
	p.WaitText("#sessions", "burst-")
	must.Between(t, 1, reads()-before, 2+int(time.Since(began)/(500*time.Millisecond)))
	must.Eq(t, 10, browser.Evaluate[int](p, `document.querySelectorAll("ol.latest li").length`))
	must.Eq(t, 50, browser.Evaluate[int](p, `document.querySelectorAll("#sessions tbody tr").length`))
}

// TestMetrics has the browser compute what the view of the server shows.
func TestMetrics(t *testing.T) {
	b := browser.Start(t)
	p := b.Open(t, newFixture(t).url+"/ui/", browser.Desktop())
	for expression, want := range map[string]string{
		`parse('# HELP a b\na{x="1 \\"}\\\\",y="2"} 3e2\n\na 1 1700000000')`:             `[{"name":"a","labels":{"x":"1 \"}\\","y":"2"},"value":300},{"name":"a","labels":{},"value":1}]`,
		`quantile(new Map([["1", 0], ["2", 10], ["+Inf", 10]]), 0.5)`:                    `1.5`,
		`quantile(new Map([["+Inf", 10], ["2", 5], ["1", 5]]), 0.5)`:                     `1`,
		`quantile(new Map([["1", 5], ["+Inf", 10]]), 0.99) === Infinity`:                 `true`,
		`isNaN(quantile(new Map([["1", 0], ["+Inf", 0]]), 0.5))`:                         `true`,
		`isNaN(quantile(new Map(), 0.5))`:                                                `true`,
		`[...minus(new Map([["a", 3], ["b", 1]]), new Map([["a", 1]]))]`:                 `[["a",2],["b",1]]`,
		`[...totals(parse('a{l="x"} 1\na{l="x"} 2\na{l="y"} 5\nb{l="x"} 9'), "a", "l")]`: `[["x",3],["y",5]]`,
		`total(parse('a{l="x"} 1\na{l="y"} 5'), "a", (labels) => labels.l === "y")`:      `5`,
	} {
		must.Eq(t, want, browser.Evaluate[string](p, `import("/ui/metrics.js").then(({ parse, quantile, minus, total, totals }) => JSON.stringify(`+expression+`))`),
			must.Sprint(expression))
	}
}

func TestScreenshot(t *testing.T) {
	b := browser.Start(t)
	s := startDev(t, "")
	for i := range 4 {
		s.create([]string{"support", "research"}[i%2], map[string]string{"ticket": strconv.Itoa(4711 + i)})
	}
	doomed := s.create("coder", map[string]string{"branch": "main"})
	p := b.Open(t, s.url+"/ui/", browser.Size{Width: 1200, Height: 640})
	p.WaitText("#live", "Live")
	s.create("support", map[string]string{"ticket": "4715"})
	s.kill(doomed)
	p.WaitText("ol.latest", "ready")
	p.WaitText("ol.latest", "dead")
	p.WaitText("#sessions", "killed by signal 9")
	p.WaitText(".states button:nth-child(5)", "dead 1")
	shot := p.Screenshot()
	must.Less(t, 150<<10, len(shot))
	if *update {
		must.NoError(t, os.WriteFile("screenshot.png", shot, 0o644)) // part of the README
	}
	kept, err := os.ReadFile("screenshot.png")
	must.NoError(t, err)
	image, err := png.DecodeConfig(bytes.NewReader(kept))
	must.NoError(t, err)
	must.Eq(t, 1200, image.Width)
}
