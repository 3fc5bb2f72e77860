package web_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/test/browser"
)

// prints returns a configuration whose sandboxes run a line of shell before they serve.
func prints(t *testing.T, line string) string {
	t.Helper()
	self, err := os.Executable()
	must.NoError(t, err)
	args, err := json.Marshal([]string{"-c", line + `; exec "$0" demo-sandbox`, self})
	must.NoError(t, err)
	return `job_vars = { command = "sh", args = ` + string(args) + ` }`
}

func TestPage_follows_the_logs_of_a_sandbox(t *testing.T) {
	b := browser.Start(t)
	s := startDev(t, prints(t, `echo hello from stdout; echo hello from stderr >&2`))
	created := s.create("talker", nil)
	p := b.Open(t, s.url+"/ui/#/sessions/"+created.ChatID.String(), browser.Desktop())
	p.WaitText("section[aria-labelledby=logs] pre", "hello from stdout\n")
	p.Click("input[value=stderr]")
	p.WaitText("section[aria-labelledby=logs] pre", "hello from stderr\n")
	s.kill(created)
	p.WaitText("section[aria-labelledby=logs]", "ended")
}

// TestPage_shows_output_as_text has a sandbox that writes hostile lines.
func TestPage_shows_output_as_text(t *testing.T) {
	b := browser.Start(t)
	s := startDev(t, prints(t, `printf '%s\n\377\n' '<img src=x onerror=window.ran=1>'`))
	created := s.create("noisy", nil)
	p := b.Open(t, s.url+"/ui/#/sessions/"+created.ChatID.String(), browser.Desktop())
	p.WaitText("section[aria-labelledby=logs] pre", "<img src=x onerror=window.ran=1>\n\ufffd")
	must.True(t, browser.Evaluate[bool](p, `window.ran === undefined && !document.querySelector("main img")`))
}
