package conformance

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/bivouac/bivouac/runtime"
)

// These are the orders to a demo sandbox.
const (
	orderRun  = ""
	orderExit = "exit"
	orderHang = "hang"
)

func orderFile(spec runtime.Spec) string {
	return filepath.Join(spec.VolumeHostPath, ".demo-sandbox-"+spec.SessionID)
}

// giveOrder writes the order for a demo sandbox that is about to be created.
func (f *fixture) giveOrder(spec runtime.Spec) {
	if f.harness.Demo {
		f.noError(os.WriteFile(orderFile(spec), []byte(f.order), 0o644), "tell the sandbox what to do")
	}
}

// hasEnded checks that no demo sandbox of the spec runs, whatever its driver
// reports. A running one holds a lock on its order file.
func (f *fixture) hasEnded(spec runtime.Spec) {
	if !f.harness.Demo {
		return
	}
	f.require(!f.isLocked(orderFile(spec)), "a sandbox of the session still runs: it has %s locked", orderFile(spec))
}

// isLocked reports whether a process has a file of a volume locked with flock(2). A file
// that is not there is not locked.
func (f *fixture) isLocked(name string) bool {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false // the check gave this one no volume
	}
	f.noError(err, "look whether something runs")
	defer func() { _ = file.Close() }()
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		f.noError(err, "look whether something runs")
	}
	return err != nil
}

// kill ends a sandbox without its driver.
func (f *fixture) kill(spec runtime.Spec, sandbox runtime.Sandbox) {
	if f.harness.Kill != nil {
		f.noError(f.harness.Kill(f.ctx, sandbox), "kill the sandbox")
		return
	}
	status, _, err := f.send(http.MethodPost, sandbox, "/exit", "", spec.AccessToken)
	if err == nil { // otherwise it ended before it answered
		same(f, http.StatusOK, status, "the status of the sandbox's answer to /exit")
	}
}

// wasToldTruth asks a demo sandbox for its session, chat and agent, and for a
// file of the volume.
func (f *fixture) wasToldTruth(spec runtime.Spec, sandbox runtime.Sandbox) {
	f.wasTold(spec, sandbox)
	const name = "from the host.txt"
	f.noError(os.WriteFile(filepath.Join(spec.VolumeHostPath, name), []byte(spec.SessionID), 0o644), "write to the volume")
	same(f, spec.SessionID, string(f.ask(spec, sandbox, "/workspace/"+url.PathEscape(name))), "the volume's file in the sandbox")
}

// wasTold asks a demo sandbox for its session, chat and agent.
func (f *fixture) wasTold(spec runtime.Spec, sandbox runtime.Sandbox) {
	var told struct {
		SessionID string `json:"session_id"`
		ChatID    string `json:"chat_id"`
		AgentID   string `json:"agent_id"`
	}
	f.noError(json.Unmarshal(f.ask(spec, sandbox, "/"), &told), "what the sandbox tells of itself")
	same(f, spec.SessionID, told.SessionID, "the session that the sandbox was told")
	same(f, spec.ChatID, told.ChatID, "the chat that the sandbox was told")
	same(f, spec.AgentID, told.AgentID, "the agent that the sandbox was told")
}

// isFile checks that a file of a volume is there.
func (f *fixture) isFile(name string) {
	_, err := os.Stat(name)
	f.noError(err, "look for a file of the volume")
}

// ask returns the body of the sandbox's answer to a GET with its access token.
func (f *fixture) ask(spec runtime.Spec, sandbox runtime.Sandbox, path string) []byte {
	status, body, err := f.send(http.MethodGet, sandbox, path, "", spec.AccessToken)
	f.noError(err, "ask the sandbox")
	same(f, http.StatusOK, status, "the status of the sandbox's answer to "+path)
	return body
}

// send sends a request with an access token to a demo sandbox. It returns an error if
// the sandbox does not answer.
func (f *fixture) send(
	method string, sandbox runtime.Sandbox, path, content string, token runtime.Secret,
) (status int, body []byte, err error) {
	address := "http://" + sandbox.Endpoint.AddrPort().String() + path
	request, err := http.NewRequestWithContext(f.patience(), method, address, strings.NewReader(content))
	f.noError(err, "ask the sandbox")
	request.Header.Set("Authorization", "Bearer "+string(token))
	request.Close = true // do not reuse a connection to another sandbox that had the port
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	body, err = io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return response.StatusCode, body, err
}
