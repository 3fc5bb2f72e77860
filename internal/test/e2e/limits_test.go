package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMoreCreatesThanThereIsRoomFor(t *testing.T) {
	// Given a Nomad with room for a few sandboxes, and many creates at once.
	w := newWorld(t, "raw_exec", "-job-var=memory=18000")
	replicas := []*replica{w.start(), w.start()}
	const callers = 200
	chats := make([]string, callers)
	problems := make([]error, callers)
	created := make([]bool, callers)
	var wg sync.WaitGroup
	for i := range callers {
		chats[i] = uuid.NewString()
		wg.Go(func() { created[i], problems[i] = replicas[i%2].wantsRoom(w, chats[i]) })
	}
	wg.Wait()

	// Then each answer is a sandbox or an error with a retry time, and the
	// sandboxes that exist are those in the answers.
	var standing []string
	for i, chat := range chats {
		must.NoError(t, problems[i])
		live, keys := len(w.liveAllocs(chat)), w.keys(chat)
		if !created[i] {
			must.Eq(t, 0, live)
			must.SliceEmpty(t, keys)
			continue
		}
		must.Eq(t, 1, live)
		standing = append(standing, chat)
	}
	must.SliceNotEmpty(t, standing)
	must.Less(t, callers, len(standing))
	must.Len(t, len(standing), w.jobs())
	list := call[wire.ListAnswer](replicas[0], http.MethodGet, "/v1/sessions", nil, http.StatusOK)
	must.Len(t, len(standing), list.Sessions)
	for _, chat := range standing {
		replicas[1].delete(chat)
	}
	must.SliceEmpty(t, w.jobs())
}

// wantsRoom creates a sandbox. It returns false if the answer says to come back
// later.
func (r *replica) wantsRoom(w *world, chat string) (created bool, err error) {
	body := strings.NewReader(fmt.Sprintf(`{"agent_id":"agent-1","volume_host_path":%q}`, w.volume))
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodPut, "http://"+r.Addr+sessionPath(chat), body)
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.api.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return false, err
	case resp.StatusCode == http.StatusCreated:
		return true, nil
	case resp.StatusCode != http.StatusServiceUnavailable && resp.StatusCode != http.StatusTooManyRequests,
		resp.Header.Get("Retry-After") == "":
		return false, fmt.Errorf("status %d, Retry-After %q: %s", resp.StatusCode, resp.Header.Get("Retry-After"), text)
	}
	return false, nil
}

func TestReplicaThatIsStoppedInMidCreateFinishesIt(t *testing.T) {
	t.Parallel()
	// Given a sandbox that only begins to answer when a file appears.
	w := newWorld(t, "raw_exec")
	w.flags = append(w.flags, "-job-var=command=/bin/sh",
		fmt.Sprintf(`-job-var=args=["-c", "until test -e %s/go; do sleep 0.1; done; exec %s demo-sandbox"]`, w.volume, binary))
	stopped := w.start()
	chat := uuid.NewString()
	answered := createUnderWay(w, stopped, chat)

	// When the replica is told to stop, it waits for the sandbox and answers.
	must.NoError(t, stopped.Signal(syscall.SIGTERM))
	stopped.hasLogged("agent_stopping")
	must.NoError(t, os.WriteFile(w.volume+"/go", nil, 0o644))
	must.StrHasPrefix(t, "201 ", <-answered)
	<-stopped.Done()
	must.Eq(t, 0, stopped.ExitCode())

	// And the next one serves the same sandbox.
	next := w.start()
	must.Eq(t, "reused", next.create(chat, w.body(), http.StatusOK).Result)
	must.Len(t, 1, w.liveAllocs(chat))
	next.delete(chat)
}

func TestReplicaThatIsStoppedInMidCreateHandsItOver(t *testing.T) {
	t.Parallel()
	// Given a create that takes longer than a replica may take to stop.
	w := newWorld(t, "raw_exec", "-job-var=ready_timeout=4m")
	w.flags = append(w.flags, "-job-var=command=/bin/sh",
		fmt.Sprintf(`-job-var=args=["-c", "until test -e %s/go; do sleep 0.1; done; exec %s demo-sandbox"]`, w.volume, binary))
	stopped, other := w.start(), w.start()
	chat := uuid.NewString()
	answered := createUnderWay(w, stopped, chat)

	// When the replica is told to stop, it undoes the create, tells the caller,
	// and stops within its limit.
	told := time.Now()
	must.NoError(t, stopped.Signal(syscall.SIGTERM))
	answer := <-answered
	must.StrHasPrefix(t, "503 ", answer)
	must.StrContains(t, answer, string(wire.CodeShuttingDown))
	must.SliceEmpty(t, w.liveAllocs(chat))
	must.SliceEmpty(t, w.keys(chat))
	<-stopped.Done()
	must.Less(t, 45*time.Second, time.Since(told))
	must.Eq(t, 0, stopped.ExitCode())

	// And the chat's next create does not wait for anything that the replica
	// left behind.
	must.NoError(t, os.WriteFile(w.volume+"/go", nil, 0o644))
	began := time.Now()
	must.Eq(t, "created", other.create(chat, w.body(), http.StatusCreated).Result)
	must.Less(t, 10*time.Second, time.Since(began))
	other.delete(chat)
}

func TestReplicaThatIsStoppedBeforeItsUndoIsDoneHandsItOver(t *testing.T) {
	t.Parallel()
	// Given a create whose sandbox takes longer to stop than a stopping replica
	// may take to undo the create.
	text, err := os.ReadFile("../../../jobs/templates/raw_exec.hcl")
	must.NoError(t, err)
	template := filepath.Join(t.TempDir(), "slow.hcl")
	slow := strings.Replace(string(text), `kill_timeout = "5s"`, `kill_timeout = "25s"`, 1)
	must.NotEq(t, string(text), slow)
	must.NoError(t, os.WriteFile(template, []byte(slow), 0o600))
	w := newWorld(t, template, "-job-var=ready_timeout=4m")
	w.flags = append(w.flags, "-job-var=command=/bin/sh",
		fmt.Sprintf(`-job-var=args=["-c", "test -e %[1]s/go && exec %[2]s demo-sandbox; trap '' INT TERM; until test -e %[1]s/go; do sleep 0.1; done"]`, w.volume, binary))
	stopped, other := w.start(), w.start()
	chat := uuid.NewString()
	answered := createUnderWay(w, stopped, chat)
	must.NoError(t, stopped.Signal(syscall.SIGTERM))

	// Then the caller is told anyway, and the next create, which waits in the
	// meantime, finishes the undo.
	next := make(chan string, 1)
	go func() {
		status, text, err := other.try(http.MethodPut, sessionPath(chat), w.body())
		next <- fmt.Sprint(status, " ", string(text), " ", err)
	}()
	must.StrHasPrefix(t, "503 ", <-answered)
	stopped.hasLogged("sandbox_undo_failed", chat)
	began := time.Now()
	must.NoError(t, os.WriteFile(w.volume+"/go", nil, 0o644))
	must.StrHasPrefix(t, "201 ", <-next)
	must.Less(t, 10*time.Second, time.Since(began))
	<-stopped.Done()
	must.Eq(t, 0, stopped.ExitCode())
	must.Len(t, 1, w.liveAllocs(chat))
	other.delete(chat)
}

func TestReplicaThatStartsBeforeNomad(t *testing.T) {
	// Given a replica that starts before its Nomad.
	w := newWorld(t, "raw_exec")
	port, err := stack.FreePort(0)
	must.NoError(t, err)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	w.env = append(w.env, "NOMAD_ADDR=http://"+addr)
	r := w.launch()
	r.awaitFailing("nomad")
	chat := uuid.NewString()
	refused := call[wire.ErrorAnswer](r, http.MethodPut, sessionPath(chat), w.body(), http.StatusServiceUnavailable)
	// Only Nomad can show whether a store is new or has lost its data.
	must.Eq(t, wire.CodeStoreUnavailable, refused.Error.Code)

	// When Nomad comes, the replica serves.
	proxy, err := faultproxy.Start(addr, faultproxy.Pass, stack.NomadForTest(t).Addr())
	must.NoError(t, err)
	t.Cleanup(proxy.Close)
	eventually(t, "a create succeeds", func() error {
		status, text, err := r.try(http.MethodPut, sessionPath(chat), w.body())
		if err == nil && status != http.StatusCreated {
			err = fmt.Errorf("status %d: %s", status, text)
		}
		return err
	})
	must.Len(t, 1, w.liveAllocs(chat))
	r.delete(chat)
	must.SliceEmpty(t, w.keys(chat))
}
