package auth

import (
	"net/netip"
	"sync"

	"golang.org/x/time/rate"

	"github.com/bivouac/bivouac/scheduler"
)

const (
	// failuresPerSecond and failuresAtOnce are how many failed tries one address may
	// make before its tries are limited.
	failuresPerSecond = 1
	failuresAtOnce    = 20
	// maxAddresses bounds how many addresses are remembered.
	maxAddresses = 4096
)

// failures limits the failed tries of each address.
type failures struct {
	mu        sync.Mutex
	addresses map[netip.Prefix]*rate.Limiter
}

func newFailures() *failures {
	return &failures{addresses: map[netip.Prefix]*rate.Limiter{}}
}

// note counts a failed try. It returns a *scheduler.LimitError if there were too many.
func (f *failures) note(address string) error {
	if f.limiter(network(address)).Allow() {
		return nil
	}
	return &scheduler.LimitError{Limit: "failed_tries", Detail: "too many failed tries from this address"}
}

func (f *failures) limiter(from netip.Prefix) *rate.Limiter {
	f.mu.Lock()
	defer f.mu.Unlock()
	limiter, ok := f.addresses[from]
	if !ok {
		if len(f.addresses) >= maxAddresses {
			f.forget()
		}
		limiter = rate.NewLimiter(failuresPerSecond, failuresAtOnce)
		f.addresses[from] = limiter
	}
	return limiter
}

// forget removes the addresses that have not failed lately, or all if there are none. An
// attacker with thousands of addresses is not stopped by a limit for each.
func (f *failures) forget() {
	for from, limiter := range f.addresses {
		if limiter.Tokens() >= failuresAtOnce {
			delete(f.addresses, from)
		}
	}
	if len(f.addresses) >= maxAddresses {
		clear(f.addresses)
	}
}

// network returns what is limited together: an IPv4 address, or the /64 of an IPv6
// address, which one machine usually has as a whole. Unix sockets share one limit.
func network(address string) netip.Prefix {
	from, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Prefix{}
	}
	ip := from.Addr().Unmap()
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.Prefix(bits) // fails only for a wrong number of bits
	return prefix
}
