package apiclient_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
)

// streaming answers a request with a body that is written as it is read.
type streaming struct {
	url  string
	body io.ReadCloser
}

func (s *streaming) RoundTrip(r *http.Request) (*http.Response, error) {
	s.url = r.URL.String()
	context.AfterFunc(r.Context(), func() { _ = s.body.Close() }) // as http.Transport does
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{wire.HeaderIndex: {"42"}}, Body: s.body, Request: r}, nil
}

// readEvents returns the indexes of the batches, and how they end.
func readEvents(ctx context.Context, t *testing.T, transport http.RoundTripper, in apiclient.EventsInput) (indexes []uint64, last error) {
	t.Helper()
	client, err := apiclient.New("127.0.0.1:4747", transport)
	must.NoError(t, err)
	for batch, err := range client.Events(ctx, in) {
		if err != nil {
			return indexes, err
		}
		indexes = append(indexes, batch.Index)
	}
	return indexes, nil
}

const eventLines = "{}\n" + `{"Index":43,"Events":[{"Type":"ready"}]}` + "\n{}\n" + `{"Index":44,"Events":[{"Type":"dead"}]}` + "\n"

func TestEvents(t *testing.T) {
	s := &streaming{body: io.NopCloser(strings.NewReader(eventLines))}
	got, err := readEvents(t.Context(), t, s, apiclient.EventsInput{After: new(uint64(42)), AgentID: "a", ChatID: chat, Types: []string{"ready", "dead"}})
	must.NoError(t, err)
	must.Eq(t, []uint64{42, 43, 44}, got, must.Sprint("heartbeats are left out"))
	must.Eq(t, "http://127.0.0.1:4747/v1/events?agent_id=a&chat_id="+chat.String()+"&follow=false&index=42&type=ready%2Cdead", s.url)

	s = &streaming{body: io.NopCloser(strings.NewReader(eventLines))}
	_, err = readEvents(t.Context(), t, s, apiclient.EventsInput{Follow: true})
	must.ErrorIs(t, err, apiclient.ErrUnreachable, must.Sprint("a server that ends a stream has more to say"))
	must.Eq(t, "http://127.0.0.1:4747/v1/events?follow=true", s.url)
}

func TestEvents_that_are_missing(t *testing.T) {
	s := &streaming{body: io.NopCloser(strings.NewReader(eventLines + `{"Error":{"code":"index_too_old","message":"gone","request_id":"r1"}}`))}
	got, err := readEvents(t.Context(), t, s, apiclient.EventsInput{Follow: true})
	must.Len(t, 3, got)
	answer, ok := errors.AsType[*apiclient.Error](err)
	must.True(t, ok)
	must.Eq(t, wire.CodeIndexTooOld, answer.Code)
	must.Eq(t, "gone", answer.Error())
}

func TestEvents_of_a_server_that_falls_silent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, body := net.Pipe()
		go func() {
			for range 3 {
				_, _ = io.WriteString(server, "{}\n")
				<-time.After(10 * time.Second)
			}
		}()
		began := time.Now()
		_, err := readEvents(t.Context(), t, &streaming{body: body}, apiclient.EventsInput{Follow: true})
		must.ErrorIs(t, err, apiclient.ErrUnreachable)
		must.ErrorContains(t, err, "no heartbeats")
		must.Eq(t, 50*time.Second, time.Since(began))
	})
}
