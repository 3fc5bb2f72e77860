package demosandbox

import (
	"io"
	"net/http"
)

// maxPrint is the maximum length of what a request prints, in bytes.
const maxPrint = 1 << 20

// printBody returns a handler that writes a request's body to the standard output, or with
// ?stream=stderr to the standard error. So you can see what becomes of a sandbox's output.
func printBody(config Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		out := config.Stdout
		if r.URL.Query().Get("stream") == "stderr" {
			out = config.Stderr
		}
		if _, err := io.Copy(out, http.MaxBytesReader(w, r.Body, maxPrint)); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	}
}
