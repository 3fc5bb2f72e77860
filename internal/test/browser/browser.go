// Package browser opens web pages in a real Chromium, for tests.
//
// [Start] starts a Chromium that ends with its test. [Browser.Open] opens a page in a tab
// of its own. A test fails if its page writes an error to the console, which includes
// violations of the Content-Security-Policy.
//
// The package knows nothing of the pages.
package browser

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// patience is how long something that must happen may take.
const patience = 60 * time.Second

// Browser is a running Chromium. Make one with [Start].
type Browser struct{ ctx context.Context }

// Start starts a Chromium, which ends with the test. Without one on PATH it skips the
// test; in CI, which has one, it fails the test.
func Start(t testing.TB) *Browser {
	t.Helper()
	path, err := find()
	if err != nil && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	options := slices.Concat(chromedp.DefaultExecAllocatorOptions[:], []chromedp.ExecAllocatorOption{
		chromedp.ExecPath(path),
		chromedp.UserDataDir(filepath.Join(t.TempDir(), "profile")),
		chromedp.DisableGPU,
	})
	if os.Geteuid() == 0 {
		options = append(options, chromedp.NoSandbox) // its sandbox refuses to run as root
	}
	allocator, endAllocator := chromedp.NewExecAllocator(context.Background(), options...) // t.Context() ends before Cleanup closes the browser in good order
	ctx, end := chromedp.NewContext(allocator)
	t.Cleanup(func() {
		end() // waits until its processes have ended
		endAllocator()
	})
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("start %s: %v", path, err)
	}
	return &Browser{ctx}
}

func find() (string, error) {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("there is no Chromium on PATH")
}

// Page is a page in a tab. Its methods fail the test if they cannot do what they should.
type Page struct {
	t   testing.TB
	ctx context.Context

	mu       sync.Mutex
	problems []string
}

// Size is the size of a page, in pixels.
type Size struct{ Width, Height int64 }

// Desktop returns the size of a page in a window.
func Desktop() Size { return Size{1280, 800} }

// Phone returns the size of a page on a small phone.
func Phone() Size { return Size{360, 740} }

// Open opens a URL in a tab, which is closed at the end of the test. The test then fails
// if the page wrote an error to the console, other than that a request was refused.
func (b *Browser) Open(t testing.TB, url string, size Size) *Page {
	t.Helper()
	p := &Page{t: t}
	var end context.CancelFunc
	p.ctx, end = chromedp.NewContext(b.ctx, chromedp.WithNewBrowserContext())
	var reading sync.WaitGroup
	t.Cleanup(func() {
		end()
		reading.Wait()
		for _, problem := range p.problems {
			t.Errorf("console of the page: %s", problem)
		}
	})
	messages := chromedp.Console(p.ctx)
	reading.Go(func() {
		for message, err := range messages {
			if err != nil {
				return // the tab is closed
			}
			p.note(message)
		}
	})
	p.do(chromedp.EmulateViewport(size.Width, size.Height))
	p.Go(url)
	return p
}

// note keeps errors and warnings. Requests that were refused are the test's matter.
func (p *Page) note(message chromedp.ConsoleMessage) {
	isProblem := message.Type == chromedp.ConsoleError || message.Type == chromedp.ConsoleWarning || message.IsException()
	if isProblem && message.Source != "network" {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.problems = append(p.problems, message.String())
	}
}

// Go goes to a URL and waits until it is loaded.
func (p *Page) Go(url string) {
	p.t.Helper()
	p.do(chromedp.Navigate(url))
}

func (p *Page) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.t.Fatalf("browser: %v\n%s", err, p.state())
	}
}

// Wait waits until a JavaScript expression is true.
func (p *Page) Wait(expression string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	// Not chromedp.Poll, which makes a function of a text: the page's policy forbids that.
	_, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`new Promise((resolve) => {
		const check = () => { (`+expression+`) ? resolve(true) : setTimeout(check, 10); };
		check();
	})`, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatalf("browser: wait for %s: %v\n%s", expression, err, p.state())
	}
}

// WaitText waits until the first element of a selector shows a text. Case counts.
func (p *Page) WaitText(selector, text string) {
	p.t.Helper()
	p.Wait(fmt.Sprintf("document.querySelector(%s)?.innerText.includes(%s)", quote(selector), quote(text)))
}

// Evaluate returns the value of a JavaScript expression. A promise is waited for.
func Evaluate[T any](p *Page, expression string) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatalf("browser: %s: %v", expression, err)
	}
	return value
}

// Text returns the text of the first element of a selector, as the page shows it.
func (p *Page) Text(selector string) string {
	p.t.Helper()
	return Evaluate[string](p, fmt.Sprintf("document.querySelector(%s)?.innerText ?? ''", quote(selector)))
}

// Click clicks the first element of a selector, once it is visible.
func (p *Page) Click(selector string) {
	p.t.Helper()
	p.do(chromedp.Click(chromedp.CSS(selector)))
}

// Type types text, or keys such as kb.Tab, into what has the focus.
func (p *Page) Type(keys string) {
	p.t.Helper()
	p.do(chromedp.KeyEvent(keys))
}

// Focused describes what has the focus: its name and its text or label.
func (p *Page) Focused() string {
	p.t.Helper()
	return Evaluate[string](p, `(() => {
		const node = document.activeElement;
		return node.localName + " " + (node.labels?.[0]?.innerText || node.getAttribute("aria-label") || node.innerText || "").split("\n")[0].trim();
	})()`)
}

// Prefer sets a media feature, such as prefers-color-scheme.
func (p *Page) Prefer(feature, value string) {
	p.t.Helper()
	p.do(func(ctx context.Context, t *chromedp.Target) (chromedp.Void, error) {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: feature, Value: value}},
		})
		return chromedp.Void{}, err
	})
}

// Screenshot returns what the page shows, as a PNG.
func (p *Page) Screenshot() []byte {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		p.t.Fatalf("browser: screenshot: %v", err)
	}
	return png
}

// state returns what the page shows and what went wrong, for a failure.
func (p *Page) state() string {
	ctx, cancel := context.WithTimeout(p.ctx, 5*time.Second)
	defer cancel()
	text, err := chromedp.Run(ctx, chromedp.Evaluate[string]("location.href + '\\n' + document.body.innerText"))
	if err != nil {
		text = err.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return "the page: " + text + "\nits console: " + strings.Join(p.problems, "\n")
}

// quote returns text as a string of JavaScript.
func quote(text string) string {
	quoted, _ := json.Marshal(text) // a string always encodes
	return string(quoted)
}
