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

// Text returns a response with a text body, as errors have.
func Text(status int, text string) *http.Response {
	resp := Answer(status, []byte(text))
	resp.Header.Set("Content-Type", "text/plain; charset=utf-8")
	return resp
}

// Direct is an [http.RoundTripper] that passes requests to a server without
// faults.
type Direct struct{ Server Server }

// RoundTrip implements [http.RoundTripper].
func (d Direct) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		defer req.Body.Close()
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	resp := d.Server.Serve(req.Context(), req, body)
	resp.Request = req
	return resp, nil
}
