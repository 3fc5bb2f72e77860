package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/stack"
)

const (
	// poolName is the pool of the replicas.
	poolName = "chaos-pool"

	// The leader keeps this many spares. They are fewer than the callers want at once, so
	// that creates start sandboxes, too.
	leastSpares, mostSpares = 2, 5
)

// pooling is the part of a replica's configuration that decides about its pool.
type pooling struct {
	size   int // of the pool
	memory int // a variable of the job template, in MB
}

// pools is what all replicas should be configured with. A fault changes it and restarts
// one replica, and the others follow when they start next.
type pools struct {
	helpers string // the part of the configuration that lets a replica call the node helpers

	mu  sync.Mutex
	now pooling
}

func newPools(helpers string) *pools {
	return &pools{helpers: helpers, now: pooling{size: 3, memory: 64}}
}

func (p *pools) current() pooling {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

func (p *pools) change(f func(*pooling)) pooling {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.now)
	return p.now
}

// write writes the configuration to a file and returns what it says.
func (p *pools) write(file string) (pooling, error) {
	now := p.current()
	text := fmt.Sprintf("%s\njob_vars = {\n  memory = %d\n}\n\npool %q {\n  runtime = \"nomad\"\n  size    = %d\n}\n", p.helpers, now.memory, poolName, now.size)
	return now, os.WriteFile(file, []byte(text), 0o600)
}

// metrics returns the replica's metrics as text.
func (r *replica) metrics(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr+"/v1/metrics", nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+r.token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	return string(text), err
}

// leads reports whether the replica says that it leads.
func (r *replica) leads(ctx context.Context) bool {
	text, err := r.metrics(ctx)
	if err != nil {
		return false // it is busy or down
	}
	for line := range strings.Lines(text) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); strings.HasPrefix(name, "bivouac_leader") && value == "1" {
			return true
		}
	}
	return false
}

// spare reports whether the sandbox is a spare that no chat has been given.
func (s *sandbox) spare() bool { return s.file != "" && s.chat == uuid.Nil }

// poolProblems compares the records of spares, by session, with the sandboxes that run.
// leaked is what must not be there, and lacking says what the pool lacks to be full.
func (w *world) poolProblems(spares map[uuid.UUID]record, running map[uuid.UUID]*sandbox) (leaked []string, lacking string) {
	ready := 0
	for id, r := range spares {
		_, runs := running[id]
		switch {
		case r.State != "ready":
			leaked = append(leaked, fmt.Sprintf("spare session %s is %s", id, r.State))
		case !runs:
			leaked = append(leaked, "record of a spare without a process: session "+id.String())
		default:
			ready++
		}
	}
	for id, s := range running {
		if _, ok := spares[id]; s.spare() && !ok {
			leaked = append(leaked, fmt.Sprintf("spare that no record names: session %s on %s, pids %v", id, s.node, s.pids))
		}
	}
	if w.pools == nil {
		return leaked, ""
	}
	switch size := w.pools.current().size; {
	case ready > size:
		leaked = append(leaked, fmt.Sprintf("%d spares are ready, and the pool has %d", ready, size))
	case ready < size:
		lacking = fmt.Sprintf("%d spares are ready, and the pool has %d", ready, size)
	}
	return leaked, lacking
}

// helpers returns the process IDs of the node helpers of this run.
func (w *world) helpers() ([]int, error) {
	all, err := stack.ProcessesWith("NOMAD_JOB_NAME=" + helperJob)
	own := []byte("NOMAD_ALLOC_DIR=" + filepath.Dir(w.nomad.VolumeDir) + "/")
	return slices.DeleteFunc(all, func(pid int) bool {
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		return err != nil || !bytes.Contains(environ, own) // it is another run's, or has gone
	}), err
}

// helperJob is the name of the job that runs the node helpers.
const helperJob = "bivouac-node"

// failedClaims counts the claims that failed, in the replicas' logs.
func (w *world) failedClaims() (n int, err error) {
	for _, r := range w.replicas {
		text, err := os.ReadFile(r.Log)
		if err != nil {
			return n, err
		}
		n += bytes.Count(text, []byte("claim_failed: "))
	}
	return n, nil
}

// poolReport describes what the pools did.
func (w *world) poolReport(broken map[violation]int) string {
	failed, err := w.failedClaims()
	if err != nil {
		w.log.note("claims that failed are not known: %v", err)
	}
	var b strings.Builder
	row := func(name string, value any, may string) { fmt.Fprintf(&b, "  %-62s %6v%s\n", name, value, may) }
	fmt.Fprintln(&b, "\nWith a pool of spares:")
	row("warm creates", w.load.warm.Load(), "")
	row("cold creates", w.load.made.Load()-w.load.warm.Load(), "")
	row("claims that failed", failed, "")
	row("sandboxes seen in /proc that were spares", w.census.spared(), "")
	row("spares given twice", broken[twice], " (must be 0)")
	row("spares left over when everything must have settled", broken[spareLeak], " (must be 0)")
	row("chats with two sandboxes", broken[duplicate], " (must be 0)")
	row("claims of a spare that does not answer", broken[silentSpare], " (must be 0)")
	if n := len(w.filled); n > 0 {
		fmt.Fprintf(&b, "The pool was full again %d times, at most %.1f s after the last fault. The last spare that was left over was gone after %.1f s at most.\n",
			n, slices.Max(w.filled).Seconds(), slices.Max(w.cleaned).Seconds())
	}
	return b.String()
}
