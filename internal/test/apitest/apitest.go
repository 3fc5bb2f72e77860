// Package apitest checks the API's answers in a test against openapi.json. It
// is for tests only, both of the API and of its clients.
//
// The package must never know what a test is about: it sees only requests and
// answers.
package apitest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	problems "github.com/pb33f/libopenapi-validator/errors"
	"github.com/pb33f/libopenapi-validator/paths"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	"github.com/pb33f/libopenapi/datamodel/high/v3"

	"github.com/bivouac/bivouac/internal/api"
	"github.com/bivouac/bivouac/internal/api/wire"
)

// Recorder is an http.RoundTripper that fails its test at every answer that
// openapi.json does not allow. It checks the status, the headers and the body,
// and rejects fields that are not described. It is safe for concurrent use.
type Recorder struct {
	t         testing.TB
	base      http.RoundTripper
	openAPI   []byte
	model     *v3.Document
	validator validator.Validator
	errors    schema_validation.SchemaValidator

	mu   sync.Mutex // guards the validator, too, which is not documented as safe for concurrent use
	seen map[string]bool
}

// New returns a Recorder for requests through base. If base is nil, it uses
// http.DefaultTransport.
func New(t testing.TB, base http.RoundTripper) *Recorder {
	t.Helper()
	return newRecorder(t, base, api.OpenAPI)
}

func newRecorder(t testing.TB, base http.RoundTripper, openAPI []byte) *Recorder {
	t.Helper()
	document, err := libopenapi.NewDocument(openAPI)
	if err != nil {
		t.Fatalf("openapi.json: %v", err)
	}
	model, err := document.BuildV3Model()
	if err != nil {
		t.Fatalf("openapi.json: %v", err)
	}
	strict := []config.Option{
		config.WithFormatAssertions(),
		config.WithStrictMode(),
		// Headers of HTTP and tracing are not part of the description.
		config.WithStrictIgnoredHeadersExtra("X-Content-Type-Options", "X-Request-Id",
			"Host", "Origin", "Sec-Fetch-Site", "Traceparent", "Tracestate"),
		// The description leaves these names open: health checks, labels, variables, a
		// server's configuration, and the description itself.
		config.WithStrictIgnorePaths("$.body.checks.*", "$.body.**.labels.*", "$.body.labels.*", "$.body.env.*", "$.body.config.*", "$.body.info", "$.body.paths",
			"$.body.servers", "$.body.security", "$.body.tags", "$.body.components"),
	}
	v, errs := validator.NewValidator(document, strict...)
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("openapi.json: %v", err)
	}
	return &Recorder{
		t: t, base: base, model: &model.Model, validator: v, openAPI: openAPI,
		errors: schema_validation.NewSchemaValidator(strict...),
		seen:   map[string]bool{},
	}
}

// RoundTrip implements http.RoundTripper.
func (r *Recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	base := r.base
	if base == nil {
		base = http.DefaultTransport
	}
	var sent []byte
	if req.Body != nil {
		var err error
		if sent, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
		req = req.Clone(req.Context())
		req.Body = io.NopCloser(bytes.NewReader(sent))
	}
	res, err := base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if err != nil {
		return nil, err
	}
	// The transport still owns the request that was sent, and the validator
	// modifies the request that it checks.
	req = req.Clone(req.Context())
	req.Body = io.NopCloser(bytes.NewReader(sent))
	res.Body = io.NopCloser(bytes.NewReader(got))

	r.mu.Lock()
	defer r.mu.Unlock()
	for _, problem := range r.check(req, res, got) {
		r.t.Errorf("%s %s is answered with %d, which openapi.json does not allow: %s\n%s",
			req.Method, req.URL, res.StatusCode, problem, got)
	}
	res.Body = io.NopCloser(bytes.NewReader(got))
	return res, nil
}

// Seen returns the answers that passed through, in the form "PUT /v1/x/{y}
// 200".
func (r *Recorder) Seen() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for answer := range r.seen {
		out = append(out, answer)
	}
	slices.Sort(out)
	return out
}

// Documented returns the final answers in openapi.json, in the form of Seen.
func (r *Recorder) Documented() []string {
	var out []string
	for name, operation := range r.operations() {
		for status := range operation.Responses.Codes.FromOldest() {
			if status >= "200" {
				out = append(out, name+" "+status)
			}
		}
	}
	slices.Sort(out)
	return out
}

func (r *Recorder) check(req *http.Request, res *http.Response, body []byte) []string {
	found := checkRequestID(res, body)
	if req.Method == http.MethodHead {
		return found // the answer to GET without its body: nothing else to check
	}
	item, errs, path := paths.FindPath(req, r.model, config.NewValidationOptions())
	if len(errs) > 0 || item == nil || strings.HasSuffix(req.URL.Path, "/") { // FindPath ignores a trailing slash
		return append(found, r.checkOutside(res, body)...)
	}
	r.seen[fmt.Sprintf("%s %s %d", req.Method, path, res.StatusCode)] = true
	for _, part := range parts(res, body) {
		res.Body = io.NopCloser(bytes.NewReader(part))
		_, errs = r.validator.ValidateHttpResponse(req, res)
		found = append(found, texts(errs)...)
	}
	if res.StatusCode < http.StatusBadRequest {
		_, errs = r.validator.ValidateHttpRequestSync(req)
		for _, text := range texts(errs) {
			found = append(found, "the request was accepted: "+text)
		}
	}
	return found
}

// parts returns the bodies that the schema of an answer describes: the body, or each line
// of it if it is JSON in lines.
func parts(res *http.Response, body []byte) [][]byte {
	if res.Header.Get("Content-Type") != wire.TypeFrames {
		return [][]byte{body}
	}
	return slices.Collect(bytes.Lines(body))
}

// checkOutside checks an answer for a path or method that the document does not
// contain.
func (r *Recorder) checkOutside(res *http.Response, body []byte) []string {
	var found []string
	switch res.StatusCode {
	case http.StatusForbidden, http.StatusNotFound:
	case http.StatusMethodNotAllowed:
		if res.Header.Get("Allow") == "" {
			found = append(found, "no Allow header")
		}
	default:
		found = append(found, "neither the path nor the method is described")
	}
	schema := r.model.Components.Schemas.GetOrZero("ErrorAnswer").Schema()
	_, errs := r.errors.ValidateSchemaBytes(schema, body)
	return append(found, texts(errs)...)
}

// checkRequestID checks the one rule that a schema cannot express: the request
// ID in an error equals the one in its header.
func checkRequestID(res *http.Response, body []byte) []string {
	if res.StatusCode < http.StatusBadRequest || len(body) == 0 {
		return nil
	}
	var answer wire.ErrorAnswer
	if err := json.Unmarshal(body, &answer); err != nil {
		return []string{"an error that is not JSON"}
	}
	header := res.Header.Get(wire.HeaderRequestID)
	if answer.Error.RequestID == "" || answer.Error.RequestID != header {
		return []string{fmt.Sprintf("request_id %q, but %s is %q", answer.Error.RequestID, wire.HeaderRequestID, header)}
	}
	return nil
}

func texts(errs []*problems.ValidationError) []string {
	var out []string
	for _, err := range errs {
		parts := []string{err.Message, err.Reason}
		for _, inner := range err.SchemaValidationErrors {
			parts = append(parts, inner.Error())
		}
		out = append(out, strings.Join(parts, "; "))
	}
	return out
}
