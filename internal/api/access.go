package api

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/scheduler"
)

// access says who may call an endpoint.
type access int

const (
	// authenticated endpoints are for all callers. The use case decides what a caller
	// may do.
	authenticated access = iota
	// open endpoints need no credential.
	open
	operatorRead
	operatorWrite
	metricsRead
)

// allow returns ErrPermissionDenied unless the caller has this access.
func (a access) allow(caller scheduler.Caller) error {
	switch a {
	case operatorRead:
		return caller.MayOperate(scheduler.LevelRead)
	case operatorWrite:
		return caller.MayOperate(scheduler.LevelWrite)
	case metricsRead:
		return caller.MayReadMetrics()
	case authenticated, open:
	}
	return nil
}

var errCertificateRequired = &apiError{
	status: http.StatusForbidden, code: wire.CodeClientCertificateRequired,
	message: "this server needs a client certificate of one of its client CAs",
}

// checkCertificate refuses a request over TLS without a client certificate, unless the
// endpoint is open: the health checks of Consul and Nomad present none. A unix socket has
// permissions instead. The listener has verified the certificate if there is one.
func (a *API) checkCertificate(r *http.Request, isOpen bool) error {
	if a.config.ClientCertificates && !isOpen && r.TLS != nil && len(r.TLS.VerifiedChains) == 0 {
		return errCertificateRequired
	}
	return nil
}

// authenticate returns the request's caller. Open endpoints get a caller who may do
// nothing if the credential is missing or wrong.
func (a *API) authenticate(r *http.Request, isOpen bool) (scheduler.Caller, error) {
	caller := scheduler.Caller{Name: scheduler.DefaultOwner, Address: r.RemoteAddr}
	if a.config.Authenticate != nil {
		credential, err := credentialOf(r.Header)
		if err == nil {
			caller, err = a.config.Authenticate(r.Context(), credential, r.RemoteAddr)
		}
		if err != nil {
			caller = scheduler.Caller{Name: scheduler.DefaultOwner, Address: r.RemoteAddr, Policies: []*scheduler.Policy{}}
			if !isOpen {
				return scheduler.Caller{}, err
			}
		}
	}
	return caller, nil
}

// credentialOf returns the credential in a request's headers, or "". Two of them are an
// error, because two programs may each look at another one.
func credentialOf(header http.Header) (string, error) {
	values := header.Values(wire.HeaderToken)
	for _, value := range header.Values("Authorization") {
		scheme, token, _ := strings.Cut(value, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return "", errScheme
		}
		values = append(values, strings.TrimSpace(token))
	}
	switch len(values) {
	case 0:
		return "", nil
	case 1:
		return values[0], nil
	default:
		return "", errTwoCredentials
	}
}

var (
	errScheme         = fmt.Errorf("%w: the Authorization header must have the form: Bearer TOKEN", scheduler.ErrUnauthenticated)
	errTwoCredentials = fmt.Errorf("%w: send one credential, in X-Bivouac-Token or in Authorization", scheduler.ErrUnauthenticated)
)
