package agent

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/bivouac/bivouac/internal/credentials"
)

// certificates are those among the credentials of this server.
type certificates map[string]credentials.Reloader

// all returns when each certificate expires, by the name of the credential.
func (c certificates) all() iter.Seq2[string, time.Time] {
	return func(yield func(string, time.Time) bool) {
		for _, name := range slices.Sorted(maps.Keys(c)) {
			certificate, ok := c[name].(*credentials.TLS)
			if !ok || certificate.Expires().IsZero() {
				continue
			}
			if !yield(name, certificate.Expires()) {
				return
			}
		}
	}
}

// health returns an error that names the certificates that have expired.
func (c certificates) health(context.Context) error {
	var errs []error
	for name, expires := range c.all() {
		if time.Now().After(expires) {
			errs = append(errs, fmt.Errorf("the certificate %s expired at %s", name, expires.UTC().Format(time.RFC3339)))
		}
	}
	return errors.Join(errs...)
}
