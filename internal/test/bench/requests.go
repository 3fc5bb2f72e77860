package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/test/faultproxy"
	"github.com/bivouac/bivouac/scheduler"
)

// counter is a proxy in front of a server. It counts the requests that contain
// certain IDs, reads and writes separately.
type counter struct {
	*faultproxy.Proxy

	mu   sync.Mutex
	seen []seen
}

// seen is the text of a request and whether it writes.
type seen struct {
	text  string
	write bool
}

func newCounter(target string) (*counter, error) {
	c := &counter{}
	var err error
	c.Proxy, err = faultproxy.Start("127.0.0.1:0", func(w http.ResponseWriter, r *http.Request, server http.Handler) {
		request := seen{text: r.URL.String() + "\n" + string(faultproxy.Body(r)), write: r.Method != http.MethodGet}
		c.mu.Lock()
		c.seen = append(c.seen, request)
		c.mu.Unlock()
		server.ServeHTTP(w, r)
	}, target)
	return c, err
}

// take returns how many requests since the last call contained one of the IDs.
func (c *counter) take(ids ...string) (reads, writes int) {
	for _, s := range c.requests() {
		for _, id := range ids {
			if strings.Contains(s.text, id) {
				if s.write {
					writes++
				} else {
					reads++
				}
				break
			}
		}
	}
	return reads, writes
}

// requests returns the requests since the last call.
func (c *counter) requests() []seen {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.seen
	c.seen = nil
	return all
}

// requests counts the requests to Consul and Nomad of one create, reuse and
// delete, and then of the cleanup of an expired session. A request counts if it
// contains the chat or session ID. A background pass that reads the record at
// the same time counts too, although it does not belong to the operation. Such
// passes are rare, so they do not affect the median.
func (w *world) requests(ctx context.Context) (report, error) {
	var out report
	toConsul, err := newCounter(w.consul.Addr())
	if err != nil {
		return nil, err
	}
	defer toConsul.Close()
	toNomad, err := newCounter(w.nomad.Addr())
	if err != nil {
		return nil, err
	}
	defer toNomad.Close()
	r, err := w.startReplica(ctx, replicaConfig{consul: toConsul.Addr(), nomad: toNomad.Addr(), prefix: "requests", template: "raw_exec"})
	if err != nil {
		return nil, err
	}

	const rounds = 11
	counts := map[string]*[3][]int{"create": {}, "reuse": {}, "delete": {}}
	for range rounds {
		chat := uuid.New()
		var session string
		for _, op := range []string{"create", "reuse", "delete"} {
			toConsul.take()
			toNomad.take()
			if op == "delete" {
				err = r.delete(ctx, chat)
			} else {
				answer, createErr := r.api.Create(ctx, chat, apiclient.CreateInput{AgentID: "bench", VolumeHostPath: r.volume})
				session, err = answer.Session.SessionID.String(), createErr
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", op, err)
			}
			cr, cw := toConsul.take(chat.String())
			nr, nw := toNomad.take(chat.String(), session)
			for i, n := range []int{cr + cw, nr, nw} {
				counts[op][i] = append(counts[op][i], n)
			}
		}
	}
	for _, op := range []string{"create", "reuse", "delete"} {
		for i, unit := range []string{"Consul round trips", "Nomad reads", "Nomad writes"} {
			slices.Sort(counts[op][i])
			median := counts[op][i][rounds/2]
			out = append(out, row{Part: "requests", What: op, N: rounds, Count: float64(median), Unit: unit + " at p50"})
		}
	}
	cleanups, err := countCleanup(ctx, r, toConsul, toNomad)
	return append(out, cleanups...), errors.Join(err, r.Stop())
}

// countCleanup counts how many requests a cleanup of expired sessions makes for
// each session.
func countCleanup(ctx context.Context, r *replica, toConsul, toNomad *counter) (out report, err error) {
	const sessions = 11
	var ids []string
	var expires time.Time
	for range sessions {
		chat := uuid.New()
		answer, err := r.api.Create(ctx, chat, apiclient.CreateInput{AgentID: "bench", VolumeHostPath: r.volume, TTL: scheduler.MinTTL})
		if err != nil {
			return nil, fmt.Errorf("create: %w", err)
		}
		ids = append(ids, chat.String(), answer.Session.SessionID.String())
		expires = answer.Session.ExpiresAt
	}
	if err := backoff.Sleep(ctx, time.Until(expires)+time.Second); err != nil { // the replicas' clock may differ by up to that
		return nil, err
	}
	toConsul.take()
	toNomad.take()
	cleaned, err := r.api.Cleanup(ctx)
	if err != nil {
		return nil, fmt.Errorf("cleanup: %w", err)
	}
	n := len(cleaned.Cleaned)
	if n != sessions {
		return nil, fmt.Errorf("cleanup: ended %d of %d sessions", n, sessions)
	}
	cr, cw := toConsul.take(ids...)
	nr, nw := toNomad.take(ids...)
	for i, unit := range []string{"Consul round trips", "Nomad reads", "Nomad writes"} {
		out = append(out, row{Part: "requests", What: "cleanup", N: n, Count: float64([]int{cr + cw, nr, nw}[i]) / sessions, Unit: unit + " on average"})
	}
	return out, nil
}
