// Package demosandbox is a small sandbox to try Bivouac out with. It is an HTTP
// server that shows its session and its workspace.
//
// [Run] serves a [Config], which [FromEnv] reads from the environment that every
// sandbox gets. The demo can fail on request, to test runtimes; see [Obey].
//
// The package does not know the Bivouac server, its API or any runtime.
package demosandbox

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"
)

// Config is the configuration of the demo sandbox.
type Config struct {
	Addr      string // where to listen, host:port
	SessionID string
	ChatID    string
	AgentID   string
	Workspace string // directory to show; must exist

	AccessToken  string // of the sandbox; empty: it has none
	RequireToken bool   // refuse requests without the access token, except GET /healthz
}

// FromEnv reads the environment that every runtime gives to a sandbox:
//
//	PORT                 the port to listen on
//	BIVOUAC_BIND         the IP to listen on, by default 127.0.0.1; 0.0.0.0 in a
//	                     container, whose port is published
//	BIVOUAC_SESSION_ID   the session's ID
//	BIVOUAC_CHAT_ID      the chat's ID
//	BIVOUAC_AGENT_ID     the AI agent's ID
//	BIVOUAC_WORKSPACE    the volume's path, by default /workspace
//	BIVOUAC_ACCESS_TOKEN the access token
func FromEnv(getenv func(string) string) Config {
	or := func(name, fallback string) string {
		if value := getenv(name); value != "" {
			return value
		}
		return fallback
	}
	return Config{
		Addr:      net.JoinHostPort(or("BIVOUAC_BIND", "127.0.0.1"), or("PORT", "8080")),
		SessionID: getenv("BIVOUAC_SESSION_ID"),
		ChatID:    getenv("BIVOUAC_CHAT_ID"),
		AgentID:   getenv("BIVOUAC_AGENT_ID"),
		Workspace: or("BIVOUAC_WORKSPACE", "/workspace"),

		AccessToken: getenv("BIVOUAC_ACCESS_TOKEN"),
	}
}

var errNoToken = errors.New("BIVOUAC_ACCESS_TOKEN is not set, so no request could be allowed")

// Run serves until ctx ends, and then stops at once: a sandbox has nothing to
// finish, and its caller waits for the stop.
func Run(ctx context.Context, config Config) error {
	if config.RequireToken && config.AccessToken == "" {
		return fmt.Errorf("demo-sandbox: %w", errNoToken)
	}
	workspace, err := os.OpenRoot(config.Workspace)
	if err != nil {
		return fmt.Errorf("demo-sandbox: open workspace: %w", err)
	}
	defer workspace.Close()
	release, err := Obey(ctx, workspace, config.SessionID)
	if err != nil {
		return fmt.Errorf("demo-sandbox: %w", err)
	}
	defer release()

	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", config.Addr)
	if err != nil {
		return fmt.Errorf("demo-sandbox: %w", err)
	}
	ctx, exit := context.WithCancelCause(ctx)
	defer exit(nil)
	server := &http.Server{
		Handler:           Handler(config, workspace, func() { exit(errToldToExit) }),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
	}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	err = server.Serve(listener)
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	if errors.Is(context.Cause(ctx), errToldToExit) {
		err = errToldToExit
	}
	if err != nil {
		return fmt.Errorf("demo-sandbox: %w", err)
	}
	return nil
}

// Handler serves /, /healthz and /workspace/, and calls exit for a POST to /exit.
// It serves nothing outside workspace, even if a symbolic link leads there. It
// refuses requests from web pages of other origins, and requests that need the access
// token and do not have it.
func Handler(config Config, workspace *os.Root, exit func()) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{
			"session_id": config.SessionID,
			"chat_id":    config.ChatID,
			"agent_id":   config.AgentID,
		})
	})
	// The body proves that this sandbox answers: another process on the port does
	// not know the session ID.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte(config.SessionID))
	})
	mux.HandleFunc("POST /exit", func(http.ResponseWriter, *http.Request) { exit() })
	mux.Handle("GET /workspace/", http.StripPrefix("/workspace", http.FileServerFS(workspace.FS())))
	return refuseWebPages(refuseStrangers(config, mux))
}

// refuseStrangers refuses requests with a wrong access token and, if config requires
// one, requests without. It allows /healthz, because Bivouac's readiness check sends no
// token.
func refuseStrangers(config Config, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, sent := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		has := config.AccessToken != ""
		// The comparison takes the same time for every wrong token of the right length, so
		// that nobody can guess the token byte by byte.
		right := has && subtle.ConstantTimeCompare([]byte(token), []byte(config.AccessToken)) == 1
		if r.URL.Path != "/healthz" && !right && (config.RequireToken || has && sent) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "send the session's access token: Authorization: Bearer TOKEN", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// refuseWebPages refuses requests that a web page of another origin may send
// through a browser on this machine: those to a DNS name, which the page's owner
// may have pointed here, and those that the browser marks as cross-origin.
func refuseWebPages(next http.Handler) http.Handler {
	protection := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isAddress(r.Host) {
			http.Error(w, fmt.Sprintf("host %q is refused: use the sandbox's IP address, or localhost", r.Host), http.StatusForbidden)
			return
		}
		// The check allows reads, but here a read shows the volume: check it as a POST.
		asPost := r.WithContext(r.Context())
		asPost.Method = http.MethodPost
		if err := protection.Check(asPost); err != nil {
			http.Error(w, "requests from other web pages are refused: "+err.Error(), http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// isAddress reports whether a Host header is an IP address or localhost.
func isAddress(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || host == "localhost"
}
