package e2e

import (
	"context"
	"fmt"
	"net/http"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
)

// events begins to read events, and returns a channel of them, as "INDEX TYPE CHAT". What
// happens after it returned is among them.
func (r *replica) events(in apiclient.EventsInput) <-chan string {
	r.t.Helper()
	client, err := apiclient.New("http://"+r.Addr, nil)
	must.NoError(r.t, err)
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	r.t.Cleanup(cancel)
	lines := make(chan string, 100)
	go func() {
		defer close(lines)
		for batch, err := range client.Events(ctx, in) {
			if err != nil {
				lines <- err.Error()
				return
			}
			if len(batch.Events) == 0 {
				lines <- "begin"
			}
			for _, e := range batch.Events {
				lines <- fmt.Sprint(e.Index, " ", e.Type, " ", e.Key)
			}
		}
	}()
	must.Eq(r.t, "begin", <-lines)
	return lines
}

func TestEventsAreTheSameOnAllReplicas(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "raw_exec")
	first, second := w.start(), w.start()
	chat := uuid.NewString()
	follow := apiclient.EventsInput{ChatID: uuid.MustParse(chat), Follow: true}
	one, other := first.events(follow), second.events(follow)

	// When a session is created at one replica and deleted at another, both tell of it.
	first.create(chat, w.body(), http.StatusCreated)
	body := w.body()
	body.AgentID = "other"
	first.create(chat, body, http.StatusConflict)
	second.delete(chat)
	var seen []string
	var index uint64
	for i, what := range []string{"created", "ready", "conflict", "deleted"} {
		line := <-one
		must.Eq(t, line, <-other)
		var at uint64
		_, err := fmt.Sscanf(line, "%d "+what+" "+chat, &at)
		must.NoError(t, err, must.Sprint(line))
		if i == 0 {
			index = at
		}
		seen = append(seen, line)
	}

	// A reader goes on at a replica that was started afterwards.
	first.stop(syscall.SIGKILL)
	second.stop(syscall.SIGTERM)
	third := w.start()
	rest := third.events(apiclient.EventsInput{After: &index})
	for _, line := range seen[1:] {
		must.Eq(t, line, <-rest)
	}
	_, more := <-rest
	must.False(t, more)
}
