package web_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// devServer is a Bivouac server in a process of its own, without Nomad and Consul. Its
// sandboxes are processes.
type devServer struct {
	t      *testing.T
	url    string
	api    *apiclient.Client
	volume string
}

// startDev starts a server with a configuration file in HCL.
func startDev(t *testing.T, configuration string) *devServer {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	must.NoError(t, err)
	port, err := stack.FreePort(0)
	must.NoError(t, err)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	file := filepath.Join(dir, "bivouac.hcl")
	must.NoError(t, os.WriteFile(file, []byte(configuration), 0o600))
	env := append(os.Environ(), "HOME="+dir, "XDG_CACHE_HOME="+dir)
	server, err := stack.NewBivouac("bivouac", self, addr, filepath.Join(dir, "log"), env, "-dev", "-config="+file)
	must.NoError(t, err)
	must.NoError(t, server.Start())
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Errorf("stop the server: %v", err)
		}
	})
	must.NoError(t, server.WaitReady(t.Context()))
	api, err := apiclient.New(addr, nil)
	must.NoError(t, err)
	s := &devServer{t: t, url: "http://" + addr, api: api, volume: filepath.Join(dir, "volume")}
	must.NoError(t, os.Mkdir(s.volume, 0o700))
	return s
}

func (s *devServer) create(agentID string, labels map[string]string) wire.Session {
	s.t.Helper()
	created, err := s.api.Create(s.t.Context(), uuid.New(), apiclient.CreateInput{AgentID: agentID, VolumeHostPath: s.volume, Labels: labels})
	must.NoError(s.t, err)
	return created.Session
}

// tokens is a configuration with two callers: one may do everything, the other may see the
// sessions of the AI agent "researcher".
var tokens = fmt.Sprintf(`
policy "all" {
  agent_prefix "" { capabilities = ["read", "write", "logs", "exec"] }
  operator = "write"
  metrics  = "read"
}
policy "reader" {
  agent_prefix "researcher" { capabilities = ["read"] }
}
token "all" {
  sha256   = "%x"
  policies = ["all"]
}
token "reader" {
  sha256   = "%x"
  policies = ["reader"]
}
`, sha256.Sum256([]byte("all-rights-0123456789abcdef0123456789")), sha256.Sum256([]byte("may-read-0123456789abcdef0123456789ab")))
