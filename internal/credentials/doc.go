// Package credentials holds what this server presents to others and whom it trusts: tokens,
// certificates and CAs, read from files that others rewrite, such as Vault's agent, a
// Nomad task or an operator.
//
// [TokenFile] reads a token. [LoadTLS] reads a certificate, its key and CAs; the [TLS] that
// it returns serves both sides of a connection. A [Watcher] reads all of them again every
// few seconds and on request. If new contents cannot be used, the old ones stay. A client asks
// for the current value with each request or connection.
//
// The package decides nothing about callers, and sends no requests.
package credentials
