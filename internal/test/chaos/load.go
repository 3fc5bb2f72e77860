package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/backoff"
)

// load makes the requests of the callers and counts the answers.
type load struct {
	replicas []*replica
	chats    []uuid.UUID
	volume   string
	told     *ledger
	log      *timeline
	requests requests

	inFlight atomic.Int32
	asked    atomic.Int64
	made     atomic.Int64 // creates that made a session
	warm     atomic.Int64 // those that got a spare
	reused   atomic.Int64
	deleted  atomic.Int64
	renewed  atomic.Int64
	failed   atomic.Int64

	mu     sync.Mutex
	served time.Time // when a create or get was last answered; zero while nobody asks
}

// These are the rates and limits of the callers.
const (
	tries     = 3 // replicas that a caller tries
	tryLimit  = 12 * time.Second
	probeEach = 200 * time.Millisecond
)

// run runs the callers until ctx is done. Then all of them leave at once, even
// in the middle of a request.
func (l *load) run(ctx context.Context, workers int, random *rand.Rand) {
	l.serve(true)
	var all sync.WaitGroup
	for range workers {
		own := rand.New(rand.NewPCG(random.Uint64(), random.Uint64()))
		all.Go(func() {
			for ctx.Err() == nil {
				l.ask(ctx, own)
				pause(ctx, time.Duration(150+own.IntN(700))*time.Millisecond)
			}
		})
	}
	for _, r := range l.replicas {
		own := rand.New(rand.NewPCG(random.Uint64(), random.Uint64()))
		all.Go(func() {
			for ctx.Err() == nil {
				_ = l.get(ctx, r, l.chats[own.IntN(len(l.chats))], time.Second) // call records the result
				pause(ctx, probeEach)
			}
		})
	}
	all.Wait()
	l.serve(false)
}

// serve records that a caller was served and how long none had been before.
// more is false if nobody asks from now on.
func (l *load) serve(more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if !l.served.IsZero() {
		l.log.faults.silence(now.Sub(l.served))
	}
	l.served = now
	if !more {
		l.served = time.Time{}
	}
}

// ask makes one request to a replica, and tries another replica if that fails.
func (l *load) ask(ctx context.Context, random *rand.Rand) {
	// Sessions of the first half of the chats change often; the others last
	// long.
	i := random.IntN(len(l.chats))
	chat, calm := l.chats[i], i >= len(l.chats)/2
	limit := tryLimit
	if random.IntN(10) == 0 { // the caller soon gives up
		limit = time.Duration(50+random.IntN(1500)) * time.Millisecond
	}
	in := l.input("agent-1", 10*time.Minute)
	if !calm && random.IntN(3) == 0 {
		in.TTL = time.Duration(5+random.IntN(15)) * time.Second
	}
	var try func(*replica) error
	switch n := random.IntN(100); {
	case n < 40:
		try = func(r *replica) error { return l.create(ctx, r, chat, in, limit) }
	case n < 45:
		in.AgentID = "agent-2"
		try = func(r *replica) error { return l.create(ctx, r, chat, in, limit) }
	case n < 65:
		try = func(r *replica) error { return l.get(ctx, r, chat, limit) }
	case n < 77:
		try = func(r *replica) error { return l.renew(ctx, r, chat, in.TTL, limit) }
	case n < 95 && (!calm || n < 79):
		try = func(r *replica) error { return l.delete(ctx, r, chat, limit) }
	default:
		try = func(r *replica) error { return l.cleanup(ctx, r, limit) }
	}
	first := random.IntN(len(l.replicas))
	for n := range tries {
		err := try(l.replicas[(first+n)%len(l.replicas)])
		if !worthAnother(err) || ctx.Err() != nil {
			return
		}
	}
	l.failed.Add(1)
}

func (l *load) input(agent string, ttl time.Duration) apiclient.CreateInput {
	return apiclient.CreateInput{AgentID: agent, VolumeHostPath: l.volume, TTL: ttl}
}

// worthAnother reports whether another replica may give a better answer.
func worthAnother(err error) bool {
	if err == nil {
		return false
	}
	e, ok := errors.AsType[*apiclient.Error](err)
	return !ok || e.Status >= http.StatusInternalServerError || e.Status == http.StatusTooManyRequests
}

// call makes one request and records it.
func (l *load) call(ctx context.Context, r *replica, changes bool, limit time.Duration, text string, f func(context.Context) (string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	l.asked.Add(1)
	l.inFlight.Add(1)
	defer l.inFlight.Add(-1)
	if changes {
		r.busy.Add(1)
		defer r.busy.Add(-1)
	}
	start := time.Now()
	came, err := f(ctx)
	if err != nil {
		came = describe(err)
	}
	if changes || err != nil && codeOf(err) != wire.CodeNotFound {
		l.log.note("%s %s, after %d ms: %s", r.name, text, time.Since(start).Milliseconds(), came)
	}
	return err
}

func describe(err error) string {
	if e, ok := errors.AsType[*apiclient.Error](err); ok {
		return fmt.Sprintf("%d %s: %s", e.Status, e.Code, e.Message)
	}
	return err.Error()
}

func codeOf(err error) wire.Code {
	if e, ok := errors.AsType[*apiclient.Error](err); ok {
		return e.Code
	}
	return ""
}

func (l *load) create(ctx context.Context, r *replica, chat uuid.UUID, in apiclient.CreateInput, limit time.Duration) error {
	op := "create chat " + chat.String() + " on " + r.name
	return l.call(ctx, r, true, limit, "create chat "+chat.String()+" for "+in.AgentID, func(ctx context.Context) (string, error) {
		ctx, tell := l.requests.ask(ctx, "create", chat)
		start := time.Now()
		res, err := r.api.Create(ctx, chat, in)
		end := time.Now()
		if err == nil {
			tell(res.Result, chat, res.Session.SessionID)
			l.serve(true)
			if res.Session.AgentID != in.AgentID {
				l.log.violation(wrong, chat.String(), "%s for %s is answered with a session of %s", op, in.AgentID, res.Session.AgentID)
			}
			a := answer{start, end, op + " (" + res.Result + ")", res.Result != "reused", res.Session}
			l.told.saw(a)
			if !a.made {
				l.reused.Add(1)
			} else if l.made.Add(1); res.Session.Warm {
				l.warm.Add(1)
			}
			if err := l.knock(res.Session); err != nil {
				l.told.silent(a, time.Now(), err)
			}
			return fmt.Sprintf("%s session %s, warm %t", res.Result, res.Session.SessionID, res.Session.Warm), nil
		}
		if e, ok := errors.AsType[*apiclient.Error](err); ok && e.Code == wire.CodeConflict && e.Session != nil {
			l.serve(true)
			if e.Session.AgentID == in.AgentID {
				l.log.violation(wrong, chat.String(), "%s for %s conflicts with a session of the same", op, in.AgentID)
			}
			l.told.saw(answer{start, end, op + " (conflict)", false, *e.Session})
		}
		return "", err
	})
}

func (l *load) get(ctx context.Context, r *replica, chat uuid.UUID, limit time.Duration) error {
	return l.call(ctx, r, false, limit, "get chat "+chat.String(), func(ctx context.Context) (string, error) {
		start := time.Now()
		op := "get chat " + chat.String() + " on " + r.name
		found, _, err := r.api.Get(ctx, chat, apiclient.Block{})
		end := time.Now()
		switch {
		case err == nil:
			l.serve(true)
			// An intent is returned as recorded, and nobody was told of it.
			if found.Session.State != "creating" {
				l.told.saw(answer{start, end, op, false, found.Session})
			}
		case codeOf(err) == wire.CodeNotFound:
			l.serve(true)
			l.told.sawNone(start, end, chat, op)
		}
		return "", err
	})
}

func (l *load) renew(ctx context.Context, r *replica, chat uuid.UUID, ttl, limit time.Duration) error {
	return l.call(ctx, r, true, limit, "renew chat "+chat.String(), func(ctx context.Context) (string, error) {
		start := time.Now()
		op := "renew chat " + chat.String() + " on " + r.name
		ctx, _ = l.requests.ask(ctx, "renew", chat) // the answer does not tell whether it changed anything
		session, err := r.api.Renew(ctx, chat, ttl)
		switch {
		case err == nil:
			l.renewed.Add(1)
			l.told.saw(answer{start, time.Now(), op, false, session})
		case codeOf(err) == wire.CodeNotFound:
			l.told.sawNone(start, time.Now(), chat, op)
		}
		return "renewed session " + session.SessionID.String(), err
	})
}

func (l *load) delete(ctx context.Context, r *replica, chat uuid.UUID, limit time.Duration) error {
	return l.call(ctx, r, true, limit, "delete chat "+chat.String(), func(ctx context.Context) (string, error) {
		start := time.Now()
		ctx, tell := l.requests.ask(ctx, "delete", chat)
		done := l.told.deleting(chat)
		res, err := r.api.Delete(ctx, chat)
		done(err == nil, res.SessionID)
		if err != nil {
			return "", err
		}
		if res.Result == "deleted" {
			tell("deleted", chat, res.SessionID)
			l.deleted.Add(1)
			return "deleted session " + res.SessionID.String(), nil
		}
		l.told.sawNone(start, time.Now(), chat, "delete chat "+chat.String()+" on "+r.name)
		return res.Result, nil
	})
}

func (l *load) cleanup(ctx context.Context, r *replica, limit time.Duration) error {
	return l.call(ctx, r, true, limit, "cleanup", func(ctx context.Context) (string, error) {
		ctx, tell := l.requests.ask(ctx, "cleanup", uuid.Nil)
		res, err := r.api.Cleanup(ctx)
		for _, s := range res.Cleaned {
			tell("expired", s.ChatID, s.SessionID)
			l.told.cleaned(s)
		}
		return fmt.Sprintf("cleaned %d, failed %d", len(res.Cleaned), res.ErrorCount), err
	})
}

// knock asks the sandbox for its identity, at the endpoint in the session.
func (l *load) knock(s wire.Session) error {
	if s.Endpoint == nil {
		return errors.New("no endpoint was told")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Endpoint.AddrPort().String()+"/healthz", nil)
	if err != nil {
		return err
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1024))
	if err == nil && string(text) != s.SessionID.String() {
		err = fmt.Errorf("it says that it is %q", text)
	}
	return err
}

func (l *load) summary() string {
	return fmt.Sprintf("%d requests: %d sessions made, %d reused, %d renewals, %d deletes; %d found no replica that could.",
		l.asked.Load(), l.made.Load(), l.reused.Load(), l.renewed.Load(), l.deleted.Load(), l.failed.Load())
}

// pause waits for d or until ctx is done.
func pause(ctx context.Context, d time.Duration) { _ = backoff.Sleep(ctx, d) }
