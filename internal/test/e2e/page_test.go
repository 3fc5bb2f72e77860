package e2e

import (
	"fmt"
	"net/http"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/browser"
)

// TestPage looks at a sandbox in Nomad with a real browser.
func TestPage(t *testing.T) {
	t.Parallel()
	eachTemplate(t, func(t *testing.T, template string) {
		w := newWorld(t, template)
		b := browser.Start(t)
		r := w.start()
		p := b.Open(t, "http://"+r.Addr+"/ui/", browser.Desktop())
		p.WaitText("#live", "Live")

		// A session that another program creates appears by itself.
		browser.Evaluate[bool](p, "window.sameDocument = true")
		chat := uuid.NewString()
		created := r.create(chat, w.body(), http.StatusCreated).Session
		p.WaitText("#sessions", chat)
		must.True(t, browser.Evaluate[bool](p, "window.sameDocument"))

		// When its sandbox dies, the page shows that and why.
		pids := processes(t, created)
		must.SliceNotEmpty(t, pids)
		for _, pid := range pids {
			must.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		}
		p.Wait(fmt.Sprintf(`[...document.querySelectorAll("#sessions tr")].some((row) =>
			row.innerText.includes(%q) && row.innerText.includes("dead") && row.innerText.includes("137"))`, chat))
		p.Click(`#sessions a[href$="` + chat + `"]`)
		p.WaitText("dl.facts", "137")
		p.WaitText("section[aria-labelledby=why]", "137")
		p.WaitText("section[aria-labelledby=timeline]", "dead")

		// It can be deleted, after a confirmation.
		p.Click("main > p > button.danger")
		p.Click("dialog button.danger")
		p.WaitText("main", "This chat has no session now.")
		must.SliceEmpty(t, w.jobs())

		// The view of the server shows what Consul and Nomad say, and the replicas.
		p.Click("nav a[href='#/server']")
		p.WaitText("section[aria-labelledby=health]", "consul")
		p.WaitText("section[aria-labelledby=health]", "nomad")
		p.WaitText("section[aria-labelledby=parts]", r.Addr)
	})
}
