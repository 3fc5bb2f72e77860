package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"
	"github.com/shoenig/test/wait"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/test/certs"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// secured is a server with TLS, client certificates and a unix socket.
type secured struct {
	t       *testing.T
	program string
	dir     string
	address string // HOST:PORT
	socket  string
	ca      *certs.CA
	env     []string
	process *os.Process
	stop    func()
}

// startSecured starts a server and waits until it is ready.
func startSecured(t *testing.T) *secured {
	t.Helper()
	program, err := exec.LookPath("bivouac")
	must.NoError(t, err)
	port, err := stack.FreePort(0)
	must.NoError(t, err)
	dir := t.TempDir()
	s := &secured{
		t: t, program: program, dir: dir, ca: certs.NewCA(t),
		address: fmt.Sprintf("127.0.0.1:%d", port),
		socket:  filepath.Join(shortDir(t), "api.sock"),
		env:     []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "XDG_CACHE_HOME=" + dir},
	}
	caFile, certFile, keyFile := certs.Write(t, s.folder("server"), s.ca, s.ca.Issue(t, "bivouac.test", "127.0.0.1"))
	config := filepath.Join(dir, "bivouac.hcl")
	must.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `
		dev        = true
		http_addr  = [%q, %q]
		host_names = ["bivouac.test"]
		unix_sockets { mode = "0660" }
		tls {
			cert_file      = %q
			key_file       = %q
			client_ca_file = %q
			verify_client  = true
		}`, s.address, "unix://"+s.socket, certFile, keyFile, caFile), 0o600))
	agent := exec.Command(program, "agent", "-config="+config)
	agent.Env = s.env
	must.NoError(t, agent.Start())
	s.process = agent.Process
	stopped := false
	s.stop = func() {
		if !stopped {
			stopped = true
			must.NoError(t, agent.Process.Signal(os.Interrupt))
			must.NoError(t, agent.Wait())
		}
	}
	t.Cleanup(s.stop)
	probe := s.client("")
	must.Wait(t, wait.InitialSuccess(wait.ErrorFunc(func() error {
		status, _, err := s.get(probe, "/v1/agent/health", "")
		if err == nil && status != http.StatusOK {
			err = errors.New("not ready")
		}
		return err
	}), wait.Timeout(patience), wait.Gap(20*time.Millisecond)))
	return s
}

// shortDir returns a folder whose path is short enough for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bivouac") //nolint:usetesting // the path of t.TempDir is too long
	must.NoError(t, err)
	t.Cleanup(func() { must.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func (s *secured) folder(name string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	must.NoError(s.t, os.MkdirAll(path, 0o700))
	return path
}

// client returns a client that presents the certificate in a folder, or none if folder is
// empty.
func (s *secured) client(folder string) *http.Client {
	s.t.Helper()
	files := credentials.Files{CA: filepath.Join(s.dir, "server", "ca.pem")}
	if folder != "" {
		files.Certificate, files.Key = filepath.Join(folder, "cert.pem"), filepath.Join(folder, "key.pem")
	}
	loaded, err := credentials.LoadTLS(files)
	must.NoError(s.t, err)
	return &http.Client{Transport: &http.Transport{DialTLSContext: loaded.Dial(""), DisableKeepAlives: true}}
}

// get returns status and body. host is the Host header; empty: that of the address.
func (s *secured) get(client *http.Client, path, host string) (int, string, error) {
	request, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, "https://"+s.address+path, nil)
	if err != nil {
		return 0, "", err
	}
	request.Host = host
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), errors.Join(err, response.Body.Close())
}

// run runs a command with variables and returns its exit code and both outputs.
func (s *secured) run(variables []string, args ...string) (int, string) {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), s.program, args...)
	cmd.Env = slices.Concat(s.env, variables)
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), string(out)
	}
	must.NoError(s.t, err)
	return 0, string(out)
}

func TestSecuredServer(t *testing.T) {
	s := startSecured(t)
	caFile, certFile, keyFile := certs.Write(t, s.folder("caller"), s.ca, s.ca.Issue(t, "caller"))
	stranger := certs.NewCA(t)
	certs.Write(t, s.folder("stranger"), stranger, stranger.Issue(t, "stranger"))
	caller, nobody := s.client(s.folder("caller")), s.client("")

	t.Run("probes need no certificate", func(t *testing.T) {
		for _, path := range []string{"/v1/agent/live", "/v1/agent/health"} {
			status, body, err := s.get(nobody, path, "")
			must.NoError(t, err)
			must.Eq(t, 200, status)
			must.StrContains(t, body, `"status":"ok"`)
		}
	})
	t.Run("everything else does", func(t *testing.T) {
		for _, path := range []string{"/v1/sessions", "/v1/agent/self", "/v1/metrics", "/v1/nothing"} {
			status, body, err := s.get(nobody, path, "")
			must.NoError(t, err)
			must.Eq(t, 403, status)
			must.StrContains(t, body, `"client_certificate_required"`)
		}
		status, _, err := s.get(caller, "/v1/sessions", "")
		must.NoError(t, err)
		must.Eq(t, 200, status)
	})
	t.Run("a certificate of another CA is refused, also for probes", func(t *testing.T) {
		_, _, err := s.get(s.client(s.folder("stranger")), "/v1/agent/live", "")
		must.ErrorContains(t, err, "tls: ")
	})
	t.Run("it knows its names, and no others", func(t *testing.T) {
		for host, want := range map[string]int{"": 200, "bivouac.test": 200, "localhost": 200, "evil.example": 403} {
			status, _, err := s.get(caller, "/v1/sessions", host)
			must.NoError(t, err)
			must.Eq(t, want, status, must.Sprint(host))
		}
	})
	t.Run("the expiry of its certificate is a metric", func(t *testing.T) {
		_, body, err := s.get(caller, "/v1/metrics", "")
		must.NoError(t, err)
		must.StrContains(t, body, `certificate_expiry_seconds{credential="http_tls"`)
	})
	t.Run("its socket has the configured mode, and needs no certificate", func(t *testing.T) {
		info, err := os.Lstat(s.socket)
		must.NoError(t, err)
		must.Eq(t, fs.ModeSocket|0o660, info.Mode())
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.socket)
		}}}
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://anything.example/v1/sessions", nil)
		must.NoError(t, err)
		response, err := client.Do(request)
		must.NoError(t, err)
		must.NoError(t, response.Body.Close())
		must.Eq(t, 200, response.StatusCode)
	})
	t.Run("commands reach it by their variables, and say which one is missing", func(t *testing.T) {
		address, ca := "BIVOUAC_ADDR=https://"+s.address, "BIVOUAC_CACERT="+caFile
		cert, key := "BIVOUAC_CLIENT_CERT="+certFile, "BIVOUAC_CLIENT_KEY="+keyFile
		for _, test := range []struct {
			name      string
			variables []string
			args      []string
			code      int
			told      string
		}{
			{"with all of them", []string{address, ca, cert, key}, nil, exitDone, "Chat"},
			{"with the server's name", []string{address, ca, cert, key, "BIVOUAC_TLS_SERVER_NAME=bivouac.test"}, nil, exitDone, "Chat"},
			{"with flags", nil, []string{"-address=https://" + s.address, "-ca-cert=" + caFile, "-client-cert=" + certFile, "-client-key=" + keyFile}, exitDone, "Chat"},
			{"by the socket", []string{"BIVOUAC_ADDR=unix://" + s.socket, ca}, nil, exitDone, "Chat"},
			{"without a CA", []string{address}, nil, exitUnreachable, "Set BIVOUAC_CACERT to the CA"},
			{"with another name", []string{address, ca, "BIVOUAC_TLS_SERVER_NAME=other.test"}, nil, exitUnreachable, "Set BIVOUAC_TLS_SERVER_NAME to a name"},
			{"without a certificate", []string{address, ca}, nil, exitError, "Set BIVOUAC_CLIENT_CERT and BIVOUAC_CLIENT_KEY"},
			{"without a key", []string{address, ca, cert}, nil, exitError, "BIVOUAC_CLIENT_KEY"},
			{"without TLS", []string{"BIVOUAC_ADDR=http://" + s.address}, nil, exitError, "use an address that begins with https://"},
		} {
			t.Run(test.name, func(t *testing.T) {
				code, told := s.run(test.variables, append([]string{"session", "create", "-agent-id=a", "-volume-host-path=" + s.dir, uuid.NewString()}, test.args...)...)
				must.Eq(t, test.code, code, must.Sprint(told))
				must.StrContains(t, told, test.told)
			})
		}
	})
	t.Run("a second server at its socket touches nothing", func(t *testing.T) {
		port, err := stack.FreePort(0)
		must.NoError(t, err)
		code, told := s.run(nil, "agent", "-dev", fmt.Sprintf("-http-addr=127.0.0.1:%d", port), "-http-addr=unix://"+s.socket)
		must.Eq(t, exitError, code)
		must.StrContains(t, told, "address already in use")
		code, _ = s.run([]string{"BIVOUAC_ADDR=unix://" + s.socket}, "session", "list")
		must.Eq(t, exitDone, code)
	})
	t.Run("its socket is gone when it ends", func(t *testing.T) {
		s.stop()
		_, err := os.Lstat(s.socket)
		must.ErrorIs(t, err, fs.ErrNotExist)
	})
}

func TestCertificatesChangeUnderLoad(t *testing.T) {
	// Given callers that make requests all the time, each on a new connection.
	s := startSecured(t)
	server, caller := s.folder("server"), s.folder("caller")
	old := s.ca.Issue(t, "caller")
	caFile, certFile, keyFile := certs.Write(t, caller, s.ca, old)
	loaded, err := credentials.LoadTLS(credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile})
	must.NoError(t, err)
	client := &http.Client{Transport: &http.Transport{DialTLSContext: loaded.Dial(""), DisableKeepAlives: true}}
	var served atomic.Int64
	loadCtx, endLoad := context.WithCancel(t.Context())
	var load sync.WaitGroup
	t.Cleanup(load.Wait)
	t.Cleanup(endLoad)
	for range 4 {
		load.Go(func() {
			for loadCtx.Err() == nil {
				status, body, err := s.get(client, "/v1/sessions", "")
				if err != nil || status != http.StatusOK {
					t.Errorf("a request failed: %d %s %v", status, body, err)
					return
				}
				served.Add(1)
			}
		})
	}
	replace := func(serverCA *certs.CA, serverPair certs.Pair, callerCA *certs.CA, callerPair certs.Pair) {
		certs.Write(t, server, serverCA, serverPair)
		must.NoError(t, s.process.Signal(syscall.SIGHUP))
		certs.Write(t, caller, callerCA, callerPair)
	}
	until := func(what string, reached func() bool) {
		t.Helper()
		must.Wait(t, wait.InitialSuccess(wait.BoolFunc(reached), wait.Timeout(patience), wait.Gap(20*time.Millisecond)), must.Sprint(what))
		_, err := loaded.Reload()
		must.NoError(t, err)
		before := served.Load()
		must.Wait(t, wait.InitialSuccess(wait.BoolFunc(func() bool { return served.Load() > before+20 }),
			wait.Timeout(patience), wait.Gap(20*time.Millisecond)), must.Sprint("requests go on"))
	}
	accepts := func(ca *certs.CA, pair certs.Pair) bool {
		folder := filepath.Join(t.TempDir(), "probe")
		must.NoError(t, os.MkdirAll(folder, 0o700))
		caFile, certFile, keyFile := certs.Write(t, folder, ca, pair)
		probe, err := credentials.LoadTLS(credentials.Files{CA: caFile, Certificate: certFile, Key: keyFile})
		must.NoError(t, err)
		status, _, err := s.get(&http.Client{Transport: &http.Transport{DialTLSContext: probe.Dial(""), DisableKeepAlives: true}}, "/v1/sessions", "")
		return err == nil && status == http.StatusOK
	}

	// When both sides change to another CA, then no request fails.
	next := certs.NewCA(t)
	oldServer, newServer, newCaller := s.ca.Issue(t, "127.0.0.1"), next.Issue(t, "127.0.0.1"), next.Issue(t, "caller")
	both := s.ca.With(next)
	replace(both, oldServer, both, old)
	until("the server trusts both CAs", func() bool { return accepts(both, newCaller) })
	replace(both, newServer, both, newCaller)
	until("the server has its new certificate", func() bool { return accepts(next, newCaller) })
	replace(next, newServer, next, newCaller)
	until("the server trusts the new CA alone", func() bool { return !accepts(next, old) })
	endLoad()
	load.Wait()
}
