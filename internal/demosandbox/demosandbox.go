// Package demosandbox is a small sandbox to try Bivouac out with. It is an HTTP
// server that shows its session and its workspace.
//
// [Run] serves a [Config], which [FromEnv] reads from the environment that every
// sandbox gets. To test runtimes, the demo can fail on request, see [Obey], and can be run
// as a command in a sandbox, see [Do].
//
// The package does not know the Bivouac server, its API or any runtime.
package demosandbox

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	Workspace string // directory to show; must exist, unless there is a SessionFile

	// SessionFile is the JSON file with the chat_id and agent_id of a sandbox that was
	// started before its chat was known. It may appear at any time, and Workspace may
	// change with it. Empty: ChatID and AgentID are right.
	SessionFile string

	AccessToken  string // of the sandbox; empty: it has none
	RequireToken bool   // refuse requests without the access token, except GET /healthz

	Command        []string  // how to run this program in the sandbox; see [Do]
	Stdout, Stderr io.Writer // what POST /print writes to
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
//	BIVOUAC_SESSION_FILE instead of the IDs of chat and AI agent: a JSON file with
//	                     them, which exists once they are known
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

		SessionFile: getenv("BIVOUAC_SESSION_FILE"),

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
	release, err := config.obey(ctx)
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
	config.Command, _ = ownCommand() // nil if it is not known, because the first thread has ended
	config.Stdout, config.Stderr = os.Stdout, os.Stderr
	server := &http.Server{
		Handler:           Handler(config, func() { exit(errToldToExit) }),
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

// obey calls Obey with the workspace. A sandbox that was started before its chat was known
// may have no workspace yet.
func (c Config) obey(ctx context.Context) (release func(), err error) {
	workspace, err := os.OpenRoot(c.Workspace)
	if errors.Is(err, fs.ErrNotExist) && c.SessionFile != "" {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open workspace: %w", err)
	}
	defer workspace.Close()
	return Obey(ctx, workspace, c.SessionID)
}

// Handler serves /, /healthz and /workspace/, calls exit for a POST to /exit, and prints
// the body of a POST to /print. It serves nothing outside the workspace, even if a symbolic
// link in it leads there. It refuses requests from web pages of other origins, and requests that
// need the access token and do not have it.
func Handler(config Config, exit func()) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		chatID, agentID, err := config.chat()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{
			"session_id": config.SessionID,
			"chat_id":    chatID,
			"agent_id":   agentID,
			"command":    config.Command,
		})
	})
	// The body proves that this sandbox answers: another process on the port does
	// not know the session ID.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte(config.SessionID))
	})
	mux.HandleFunc("POST /print", printBody(config))
	mux.HandleFunc("POST /exit", func(http.ResponseWriter, *http.Request) { exit() })
	mux.HandleFunc("GET /workspace/", func(w http.ResponseWriter, r *http.Request) {
		workspace, err := os.OpenRoot(config.Workspace) // each time, because it may have changed
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer workspace.Close()
		http.StripPrefix("/workspace", http.FileServerFS(workspace.FS())).ServeHTTP(w, r)
	})
	return refuseWebPages(refuseStrangers(config, mux))
}

// chat returns the IDs of the chat and its AI agent. They are empty as long as the sandbox
// has no chat.
func (c Config) chat() (chatID, agentID string, err error) {
	if c.SessionFile == "" {
		return c.ChatID, c.AgentID, nil
	}
	text, err := os.ReadFile(c.SessionFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	var session struct {
		SessionID string `json:"session_id"`
		ChatID    string `json:"chat_id"`
		AgentID   string `json:"agent_id"`
	}
	if err == nil {
		err = json.Unmarshal(text, &session)
	}
	if err == nil && session.SessionID != c.SessionID {
		err = fmt.Errorf("it is for session %q", session.SessionID)
	}
	if err != nil {
		return "", "", fmt.Errorf("session file: %w", err)
	}
	return session.ChatID, session.AgentID, nil
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
