// Package api serves the Control API. It turns requests into calls of the scheduler's
// use cases, and turns their results and errors into JSON.
//
// The package checks what belongs to HTTP: paths, methods, hosts, media types, and the
// form of bodies and queries. The scheduler checks the values. net/http itself answers
// malformed requests in plain text, with status 400, 417, 431, 501 or 505. openapi.json
// is the description of the API, written by hand; package apitest checks every answer in
// the tests against it.
//
// The package does not know which store or runtime is used.
package api
