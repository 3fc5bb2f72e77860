package network

import (
	"bytes"
	"io"
	"net/http"
)

// Answer returns a response with a JSON body.
func Answer(status int, body []byte) *http.Response {
	return &http.Response{
		StatusCode: status, Status: http.StatusText(status),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header:        http.Header{"Content-Type": {"application/json"}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
	}
}

// Text returns a response with a body of text, as errors have.
func Text(status int, text string) *http.Response {
	resp := Answer(status, []byte(text))
	resp.Header.Set("Content-Type", "text/plain; charset=utf-8")
	return resp
}
