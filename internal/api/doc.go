// Package api serves the Control API: it turns requests into calls of the
// scheduler's use cases, and their results and errors into JSON.
//
// It checks what is HTTP's: paths, methods, hosts, media types, the form of a
// body and of a query. What a session may be is the scheduler's to say. The
// package must never know which store or runtime stands behind it.
//
// What net/http refuses before it knows a request is answered by net/http, in
// plain text: with 400, 417, 431, 501 or 505.
//
// openapi.json is the API's description, written by hand. Package apitest holds
// every answer of a test against it.
package api
