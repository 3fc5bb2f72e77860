package web_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/command"
	"github.com/bivouac/bivouac/internal/web"
)

// The test binary is also the program that the tests run.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-test.") {
		os.Exit(command.Main())
	}
	os.Exit(m.Run())
}

func get(t *testing.T, method, path string) *httptest.ResponseRecorder {
	t.Helper()
	rec := httptest.NewRecorder()
	web.Handler().ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), method, path, nil))
	return rec
}

func TestHandler(t *testing.T) {
	for _, tc := range []struct {
		name, method, path string
		status             int
		contentType        string
	}{
		{"serves the page", "GET", "/ui/", 200, "text/html; charset=utf-8"},
		{"serves its style", "GET", "/ui/app.css", 200, "text/css; charset=utf-8"},
		{"serves its program", "GET", "/ui/app.js", 200, "text/javascript; charset=utf-8"},
		{"serves its icon", "HEAD", "/ui/icon.svg", 200, "image/svg+xml"},
		{"has no other file", "GET", "/ui/other.js", 404, "text/plain; charset=utf-8"},
		{"lists no folder", "GET", "/ui/.", 404, "text/plain; charset=utf-8"},
		{"leaves its folder in no way", "GET", "/ui/../web.go", 404, "text/plain; charset=utf-8"},
		{"can only be read", "POST", "/ui/", 405, "text/plain; charset=utf-8"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rec := get(t, tc.method, tc.path)
			must.Eq(t, tc.status, rec.Code)
			must.Eq(t, tc.contentType, rec.Header().Get("Content-Type"))
			for name, want := range map[string]string{
				"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; " +
					"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
				"X-Content-Type-Options":       "nosniff",
				"Referrer-Policy":              "no-referrer",
				"Cache-Control":                "no-store",
				"Cross-Origin-Opener-Policy":   "same-origin",
				"Cross-Origin-Resource-Policy": "same-origin",
			} {
				must.Eq(t, want, rec.Header().Get(name))
			}
		})
	}
}

// TestPage_keeps_its_rules reads what the browser cannot show: that nothing in the files
// could run text, keep the token, or come from elsewhere.
func TestPage_keeps_its_rules(t *testing.T) {
	files, err := os.ReadDir("assets")
	must.NoError(t, err)
	must.SliceNotEmpty(t, files)
	for _, file := range files {
		text := get(t, http.MethodGet, "/ui/"+file.Name()).Body.String()
		for _, forbidden := range []string{
			"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "new Function",
			"localStorage", "sessionStorage", "indexedDB", "document.cookie", "https://", " style=", "<script>", "<style",
		} {
			must.StrNotContains(t, text, forbidden, must.Sprint(file.Name()))
		}
	}
}
