// Package web has the page for people: sessions as they change, what became of a session
// and why, its logs, and the state of a server.
//
// [Handler] serves the files of the page, which are part of the program. The page is plain
// HTML, CSS and JavaScript, without a build step and without anything from another server.
// It calls the HTTP API of the server that it came from, as any other program does. If the
// API needs a token, the page asks for one and keeps it in the memory of its tab.
//
// The package knows no sessions and checks no credentials: its files are the same for
// everybody, and the API decides what a caller sees.
package web

import (
	"embed"
	"io/fs"
	"net/http"
	"path"
	"strings"
)

//go:embed assets
var assets embed.FS

// root is the path of the page.
const root = "/ui/"

// policy allows the page its own files and requests to its own server. Text that gets
// into the page as markup in spite of everything can therefore run nothing.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// Handler serves the page below /ui/.
func Handler() http.Handler { return http.HandlerFunc(serve) }

func serve(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	for name, value := range map[string]string{
		"Content-Security-Policy":      policy,
		"Cross-Origin-Opener-Policy":   "same-origin",
		"Cross-Origin-Resource-Policy": "same-origin",
		"Referrer-Policy":              "no-referrer",
		"X-Content-Type-Options":       "nosniff",
		"Cache-Control":                "no-store", // after an upgrade all files are of the same version
	} {
		header.Set(name, value)
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		header.Set("Allow", "GET, HEAD")
		http.Error(w, "the page can only be read", http.StatusMethodNotAllowed)
		return
	}
	name := strings.TrimPrefix(r.URL.Path, root)
	if name == "" {
		name = "index.html"
	}
	content, err := fs.ReadFile(assets, "assets/"+name)
	if err != nil {
		http.Error(w, "the page has no such file", http.StatusNotFound)
		return
	}
	header.Set("Content-Type", contentType(name))
	_, _ = w.Write(content) //nolint:gosec // an embedded file; it fails only if the caller has gone
}

// contentType does not ask package mime, which depends on the machine.
func contentType(name string) string {
	switch path.Ext(name) {
	case ".html":
		return "text/html; charset=utf-8"
	case ".css":
		return "text/css; charset=utf-8"
	case ".js":
		return "text/javascript; charset=utf-8"
	case ".svg":
		return "image/svg+xml"
	default:
		return "application/octet-stream"
	}
}
