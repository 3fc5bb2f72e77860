package api_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func TestLogs_query(t *testing.T) {
	for _, c := range []struct {
		query string
		want  scheduler.LogQuery
		wrong string
	}{
		{"", scheduler.LogQuery{Stream: runtime.Stdout, Tail: -1}, ""},
		{"?type=stderr&follow=true&tail=10&task=web", scheduler.LogQuery{Stream: runtime.Stderr, Task: "web", Tail: 10, Follow: true}, ""},
		{"?type=stdout&follow=false&tail=0", scheduler.LogQuery{Stream: runtime.Stdout}, ""},
		{"?type=stdin", scheduler.LogQuery{}, "type is neither stdout nor stderr"},
		{"?follow=1", scheduler.LogQuery{}, "follow is neither true nor false"},
		{"?tail=-1", scheduler.LogQuery{}, "tail is not a number from 0 to 1000000"},
		{"?tail=1000001", scheduler.LogQuery{}, "tail is not a number from 0 to 1000000"},
		{"?tail=all", scheduler.LogQuery{}, "tail is not a number from 0 to 1000000"},
	} {
		t.Run(c.query, func(t *testing.T) {
			f := &fake{}
			a := start(t, f)
			r := request{method: "GET", path: readLogs.path + c.query}
			if c.wrong != "" {
				status, refusal := a.refused(r)
				must.Eq(t, 400, status)
				must.StrContains(t, refusal.Message, c.wrong)
				return
			}
			a.send(r)
			must.Eq(t, c.want, f.logs)
		})
	}
}

func TestLogs_type(t *testing.T) {
	const text, frames = "text/plain; charset=utf-8", "application/x-ndjson"
	for _, c := range []struct {
		accept []string
		want   string // empty: 406
	}{
		{nil, text},
		{[]string{"*/*"}, text},
		{[]string{"text/plain"}, text},
		{[]string{"text/html, application/xhtml+xml;q=0.9, */*;q=0.8"}, text},
		{[]string{"application/x-ndjson"}, frames},
		{[]string{"Application/X-NDJSON; charset=utf-8"}, frames},
		{[]string{"text/plain", "application/x-ndjson;q=0.5"}, frames},
		{[]string{"application/json"}, ""},
		{[]string{""}, ""},
	} {
		t.Run(strings.Join(c.accept, " + "), func(t *testing.T) {
			res, _ := start(t, &fake{}).send(request{method: "GET", path: readLogs.path, header: http.Header{"Accept": c.accept}})
			if c.want == "" {
				must.Eq(t, http.StatusNotAcceptable, res.StatusCode)
				return
			}
			must.Eq(t, c.want, res.Header.Get("Content-Type"))
			must.Eq(t, "nosniff", res.Header.Get("X-Content-Type-Options"))
		})
	}
}

func TestLogs_asText(t *testing.T) {
	t.Run("are the bytes as they are, with the end in a trailer", func(t *testing.T) {
		raw := "one\r\n\x1b[31m<two>\xff\x00"
		res, body := start(t, &fake{onLogs: func(_ context.Context, write func(string) error) error { return write(raw) }}).send(readLogs)
		must.Eq(t, raw, body)
		must.Eq(t, http.Header{wire.TrailerEnd: {"dead: exit code 3"}}, res.Trailer)
	})
	t.Run("may be empty", func(t *testing.T) {
		res, body := start(t, &fake{onLogs: func(context.Context, func(string) error) error { return nil }}).send(readLogs)
		must.Eq(t, "", body)
		must.Eq(t, "dead: exit code 3", res.Trailer.Get(wire.TrailerEnd))
	})
	t.Run("of a HEAD have no body, and no follower", func(t *testing.T) {
		f := &fake{}
		res, body := start(t, f).send(request{method: "HEAD", path: readLogs.path + "?follow=true"})
		must.Eq(t, 200, res.StatusCode)
		must.Eq(t, "", body)
		must.False(t, f.logs.Follow)
	})
}

// readFramesOf returns the frames that a log with these pieces is sent as, without their
// times.
func readFramesOf(t *testing.T, pieces ...string) []map[string]any {
	t.Helper()
	began := time.Now()
	_, body := start(t, &fake{onLogs: func(_ context.Context, write func(string) error) error {
		for _, piece := range pieces {
			if err := write(piece); err != nil {
				return err
			}
		}
		return nil
	}}).send(readFrames)
	var frames []map[string]any
	for line := range strings.Lines(body) {
		must.StrHasSuffix(t, "\n", line)
		var frame map[string]any
		must.NoError(t, json.Unmarshal([]byte(line), &frame))
		if text, ok := frame["time"].(string); ok {
			at, err := time.Parse(time.RFC3339Nano, text)
			must.NoError(t, err)
			must.Between(t, began.UnixNano(), at.UnixNano(), time.Now().UnixNano())
			delete(frame, "time")
		}
		frames = append(frames, frame)
	}
	return frames
}

func TestLogs_asFrames(t *testing.T) {
	type frame = map[string]any
	end := frame{"end": frame{"state": "dead", "reason": "exit code 3"}}
	for name, c := range map[string]struct {
		pieces []string
		want   []frame
	}{
		"nothing":         {nil, []frame{end}},
		"text":            {[]string{"one\n", "<two>\n"}, []frame{{"offset": 0.0, "data": "one\n"}, {"offset": 4.0, "data": "<two>\n"}, end}},
		"no new output":   {[]string{"one\n", ""}, []frame{{"offset": 0.0, "data": "one\n"}, {}, end}},
		"what is no text": {[]string{"a\xffb"}, []frame{{"offset": 0.0, "data_base64": "Yf9i"}, end}},
		"a character in two pieces": {[]string{"a\xe2", "\x82", "\xacb"}, []frame{
			{"offset": 0.0, "data": "a"}, {"offset": 1.0, "data": "€b"}, end,
		}},
		"the beginning of a character": {[]string{"a\xe2\x82"}, []frame{
			{"offset": 0.0, "data": "a"}, {"offset": 1.0, "data_base64": "4oI="}, end,
		}},
	} {
		t.Run(name, func(t *testing.T) { must.Eq(t, c.want, readFramesOf(t, c.pieces...)) })
	}
}

// follow sends a request and returns the lines of its answer while it is read.
func (a *agent) follow(r request) (*http.Response, *bufio.Reader) {
	a.t.Helper()
	res, err := http.DefaultClient.Do(a.newRequest(a.t.Context(), r))
	must.NoError(a.t, err)
	a.t.Cleanup(func() { _ = res.Body.Close() })
	return res, bufio.NewReader(res.Body)
}

func TestLogs_arriveAtOnce(t *testing.T) {
	for name, r := range map[string]request{"text": readLogs, "frames": readFrames} {
		t.Run(name, func(t *testing.T) {
			next := make(chan string)
			f := &fake{onLogs: func(_ context.Context, write func(string) error) error {
				for text := range next {
					if err := write(text); err != nil {
						return err
					}
				}
				return nil
			}}
			a := start(t, f)
			go func() { next <- "" }() // nothing was kept
			_, lines := a.follow(r)    // and yet the answer begins
			for _, text := range []string{"one\n", "two\n"} {
				next <- text
				line, err := lines.ReadString('\n')
				for err == nil && line == "{}\n" {
					line, err = lines.ReadString('\n')
				}
				must.NoError(t, err)
				must.StrContains(t, line, strings.TrimSpace(text))
			}
			close(next)
			_, err := io.ReadAll(lines)
			must.NoError(t, err)
		})
	}
}

func TestLogs_endWhenTheServerStops(t *testing.T) {
	for name, c := range map[string]struct {
		request request
		body    string
		trailer string
	}{
		"text":   {readLogs, "one\n", "running: server shutting down"},
		"frames": {readFrames, `{"end":{"state":"running","reason":"server shutting down"}}` + "\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := start(t, &fake{onLogs: func(ctx context.Context, write func(string) error) error {
				if err := write("one\n"); err != nil {
					return err
				}
				<-ctx.Done()
				return ctx.Err()
			}})
			res, lines := a.follow(c.request)
			_, err := lines.Peek(1)
			must.NoError(t, err)
			must.NoError(t, a.server.Shutdown(t.Context()))
			body, err := io.ReadAll(lines)
			must.NoError(t, err)
			must.StrHasSuffix(t, c.body, string(body))
			must.Eq(t, c.trailer, res.Trailer.Get(wire.TrailerEnd))
		})
	}
}

func TestLogs_thatFailAreCutOff(t *testing.T) {
	for name, r := range map[string]request{"text": readLogs, "frames": readFrames} {
		t.Run(name, func(t *testing.T) {
			a := start(t, &fake{onLogs: func(_ context.Context, write func(string) error) error {
				return errors.Join(write("one\n"), runtime.ErrUnavailable)
			}})
			_, lines := a.follow(r)
			_, err := io.ReadAll(lines)
			must.ErrorIs(t, err, io.ErrUnexpectedEOF)
		})
	}
}

func TestLogs_endWithTheirReader(t *testing.T) {
	ended := make(chan error, 1)
	a := start(t, &fake{onLogs: func(ctx context.Context, write func(string) error) error {
		err := write("one\n")
		<-ctx.Done()
		ended <- errors.Join(err, ctx.Err())
		return ctx.Err()
	}})
	res, _ := a.follow(readFrames)
	must.NoError(t, res.Body.Close())
	must.ErrorIs(t, <-ended, context.Canceled)
}
