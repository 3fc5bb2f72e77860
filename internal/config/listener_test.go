package config

import (
	"crypto/tls"
	"io/fs"
	"strings"
	"testing"

	"github.com/shoenig/test/must"
)

func TestHTTPAddr(t *testing.T) {
	for name, test := range map[string]struct {
		file string
		args []string
		want []string
	}{
		"is loopback by default":           {"", nil, []string{"127.0.0.1:4747"}},
		"may be one address":               {`http_addr = "localhost:1"`, nil, []string{"localhost:1"}},
		"may be several":                   {`http_addr = ["[::1]:1", "unix:///run/b.sock"]`, nil, []string{"[::1]:1", "unix:///run/b.sock"}},
		"of flags replace those of a file": {`http_addr = ["[::1]:1"]`, []string{"-http-addr=127.0.0.1:2", "-http-addr=unix:///b"}, []string{"127.0.0.1:2", "unix:///b"}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := load(t, append(test.args, "-config", write(t, "a.hcl", test.file))...)
			must.NoError(t, err)
			must.Eq(t, test.want, c.HTTPAddrs)
		})
	}
}

func TestListenerThatIsRefused(t *testing.T) {
	for _, test := range []struct{ file, want string }{
		{`http_addr = []`, "a.hcl:1: http_addr: must not be empty"},
		{`http_addr = 4747`, "a.hcl:1: "},
		{`http_addr = ["127.0.0.1:1", "0.0.0.0:1"]`, `a.hcl:1: http_addr: "0.0.0.0" is not a loopback address. Without authentication`},
		{`http_addr = "bivouac.example:1"`, `"bivouac.example" is not a loopback address`},
		{`http_addr = ":1"`, `"" is not a loopback address`},
		{`http_addr = "unix://run/b.sock"`, `"unix://run/b.sock" must have the form unix:///PATH`},
		{`http_addr = "unix:///run/../b.sock"`, "with an absolute, clean path"},
		{`http_addr = "unix:///` + strings.Repeat("x", 80) + `"`, "has a path of over 80 bytes"},
		{"dev = true\nhttp_addr = [\"unix:///b\", \"127.0.0.1:1\"]", "a.hcl:2: http_addr: with dev the first address must have the form HOST:PORT"},
		{`host_names = ["https://bivouac.example"]`, `a.hcl:1: host_names: "https://bivouac.example" is not a host name`},
		{`host_names = ["bivouac.example:4747"]`, "without scheme and port"},
		{`host_names = [""]`, "is not a host name"},
		{"unix_sockets {\n  mode = \"0888\"\n}", `a.hcl:2: unix_sockets.mode: "0888" is not a mode such as 0660`},
		{`unix_sockets { mode = "4755" }`, "is not a mode"},
		{"\ntls {}", "a.hcl:2: tls: needs cert_file and key_file"},
		{`tls { cert_file = "/c" }`, "needs cert_file and key_file"},
		{"tls {\n  cert_file = \"/c\"\n  key_file = \"/k\"\n  verify_client = true\n}", "a.hcl:4: tls.verify_client: needs client_ca_file"},
		{"tls {\n  cert_file = \"/c\"\n  key_file = \"/k\"\n  min_version = \"tls11\"\n}", `a.hcl:4: tls.min_version: unknown version "tls11" (available: tls12, tls13)`},
	} {
		t.Run(test.file, func(t *testing.T) {
			_, err := load(t, "-config", write(t, "a.hcl", test.file))
			must.ErrorContains(t, err, test.want)
		})
	}
}

func TestListener(t *testing.T) {
	c, err := load(t, "-config", write(t, "a.hcl", `
		http_addr  = ["127.0.0.1:1", "unix:///run/bivouac/api.sock"]
		host_names = ["bivouac.example"]
		unix_sockets {
			mode  = "0660"
			user  = "bivouac"
			group = "1000"
		}
		tls {
			cert_file      = "/c"
			key_file       = "/k"
			client_ca_file = "/ca"
			verify_client  = true
			min_version    = "tls13"
		}`))
	must.NoError(t, err)
	must.Eq(t, []string{"bivouac.example"}, c.HostNames)
	must.Eq(t, UnixSockets{Mode: "0660", User: "bivouac", Group: "1000"}, c.UnixSockets)
	must.Eq(t, fs.FileMode(0o660), c.UnixSockets.FileMode())
	must.Eq(t, TLS{CertFile: "/c", KeyFile: "/k", ClientCAFile: "/ca", VerifyClient: true, MinVersion: "tls13"}, c.TLS)
	must.Eq(t, tls.VersionTLS13, int(c.TLS.Version()))

	byDefault, err := load(t)
	must.NoError(t, err)
	must.Eq(t, fs.FileMode(0o600), byDefault.UnixSockets.FileMode())
	must.Eq(t, tls.VersionTLS12, int(byDefault.TLS.Version()))
}
