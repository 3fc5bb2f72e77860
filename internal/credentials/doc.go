// Package credentials holds what this server presents to others and whom it trusts: read
// from files, and read again when these change.
//
// [LoadTLS] reads a certificate, its key and CAs. The [TLS] that it returns serves both
// sides of a connection.
//
// The package decides nothing about callers, and sends no requests.
package credentials
