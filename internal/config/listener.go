package config

import (
	"crypto/tls"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// UnixSockets describes the files of unix sockets that the API listens on.
type UnixSockets struct {
	Mode  string // octal
	User  string // name or ID; empty: the user of the server
	Group string // name or ID; empty: the group of the server
}

// FileMode returns the mode as permissions.
func (u UnixSockets) FileMode() fs.FileMode {
	mode, _ := parseMode(u.Mode) // checked by check
	return mode
}

// parseMode returns the permissions in an octal number such as 0660.
func parseMode(text string) (fs.FileMode, error) {
	mode, err := strconv.ParseUint(text, 8, 9)
	return fs.FileMode(mode), err
}

// TLS describes the TLS of addresses of the form HOST:PORT. It is off if CertFile is
// empty.
type TLS struct {
	CertFile     string
	KeyFile      string
	ClientCAFile string
	VerifyClient bool
	MinVersion   string // a key of tlsVersions
}

// Version returns the minimum version as crypto/tls has it.
func (t TLS) Version() uint16 { return tlsVersions[t.MinVersion] }

var tlsVersions = map[string]uint16{"tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13}

// unixScheme begins the address of a unix socket.
const unixScheme = "unix://"

// maxSocketPath bounds the path of a unix socket, in bytes. Operating systems allow about
// 104, and the socket is made in a folder beside its path.
const maxSocketPath = 80

func (c *Config) listenerBlocks() map[string][]key {
	return map[string][]key{
		"tls": {
			{name: "cert_file", target: &c.TLS.CertFile, usage: "PEM `FILE` of the certificate, with its intermediate certificates. Read again when it changes, as are the other files."},
			{name: "key_file", target: &c.TLS.KeyFile, usage: "PEM `FILE` of the certificate's key."},
			{name: "client_ca_file", target: &c.TLS.ClientCAFile, usage: "PEM `FILE` of the CAs of client certificates."},
			{name: "verify_client", target: &c.TLS.VerifyClient, usage: "Whether callers need a client certificate, except at /v1/agent/live, /v1/agent/health, /v1/openapi.json and /ui/."},
			{name: "min_version", target: &c.TLS.MinVersion, usage: "Lowest version of TLS: tls12 or tls13."},
		},
		"unix_sockets": {
			{name: "mode", target: &c.UnixSockets.Mode, usage: "Permissions in octal. Anyone who may write to a socket may connect."},
			{name: "user", target: &c.UnixSockets.User, usage: "Name or ID of the owner. (default the user of the server)"},
			{name: "group", target: &c.UnixSockets.Group, usage: "Name or ID of the group. (default the group of the server)"},
		},
	}
}

// checkListener refuses addresses that would let everybody in, and what is wrong with
// sockets and TLS. It does not look at files.
func (c *Config) checkListener(refuse func(name, format string, args ...any)) {
	if len(c.HTTPAddrs) == 0 {
		refuse("http_addr", "must not be empty")
	}
	for i, addr := range c.HTTPAddrs {
		err := checkAddress(addr, c.Authenticates())
		if err == nil && c.Dev && i == 0 && strings.HasPrefix(addr, unixScheme) {
			err = fmt.Errorf("with dev the first address must have the form HOST:PORT, because it names the server's files")
		}
		if err != nil {
			refuse("http_addr", "%w", err)
		}
	}
	for _, name := range c.HostNames {
		if name == "" || strings.ContainsAny(name, ":/ ") {
			refuse("host_names", "%q is not a host name such as bivouac.example, without scheme and port", name)
		}
	}
	if _, err := parseMode(c.UnixSockets.Mode); err != nil {
		refuse("unix_sockets.mode", "%q is not a mode such as 0660", c.UnixSockets.Mode)
	}
	if c.TLS == (TLS{MinVersion: c.TLS.MinVersion}) && !c.Says("tls") {
		return
	}
	if c.TLS.CertFile == "" || c.TLS.KeyFile == "" {
		refuse("tls", "needs cert_file and key_file")
	}
	if c.TLS.VerifyClient && c.TLS.ClientCAFile == "" {
		refuse("tls.verify_client", "needs client_ca_file, the CAs of the certificates to accept")
	}
	if c.TLS.Version() == 0 {
		refuse("tls.min_version", "unknown version %q (available: %s)", c.TLS.MinVersion,
			strings.Join(slices.Sorted(maps.Keys(tlsVersions)), ", "))
	}
}

// checkAddress refuses an address that others could reach, unless callers authenticate. A
// name other than localhost may resolve to another address later.
func checkAddress(addr string, authenticates bool) error {
	if path, ok := strings.CutPrefix(addr, unixScheme); ok {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path {
			return fmt.Errorf("%q must have the form unix:///PATH, with an absolute, clean path", addr)
		}
		if len(path) > maxSocketPath {
			return fmt.Errorf("%q has a path of over %d bytes", addr, maxSocketPath)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q must have the form HOST:PORT or unix:///PATH", addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q is not a port", port)
	}
	if authenticates || host == "localhost" {
		return nil
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.Unmap().IsLoopback() {
		return fmt.Errorf("%q is not a loopback address. Without authentication everybody who reaches the API may use it: "+
			"add a token block, which `bivouac token new NAME` prints, or listen on 127.0.0.1 or unix:///PATH", host)
	}
	return nil
}
