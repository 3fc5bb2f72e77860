package pluginhost

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	goplugin "github.com/hashicorp/go-plugin"

	wire "github.com/bivouac/bivouac/internal/pluginwire"
)

// maxHandshake bounds the first line that a plugin prints, in bytes. The
// longest part of it is a certificate.
const maxHandshake = 16 << 10

// checkHandshake checks the first line that a plugin prints. Its errors are clearer
// than those of go-plugin, and it runs before a connection is tried.
func checkHandshake(line string) error {
	fields := strings.Split(strings.TrimSpace(line), "|")
	if len(fields) < 5 {
		return fmt.Errorf("its first line is no handshake: %.200q", line)
	}
	core, version, network, address, protocol := fields[0], fields[1], fields[2], fields[3], fields[4]
	switch {
	case core != strconv.Itoa(goplugin.CoreProtocolVersion):
		return fmt.Errorf("handshake: it speaks version %.20q of go-plugin's protocol, and %d is needed", core, goplugin.CoreProtocolVersion)
	case version != strconv.Itoa(wire.ProtocolVersion):
		return fmt.Errorf("handshake: it speaks version %.20q of Bivouac's runtime protocol, and %d is needed", version, wire.ProtocolVersion)
	case protocol != string(goplugin.ProtocolGRPC):
		return fmt.Errorf("handshake: it speaks %.20q, and grpc is needed", protocol)
	}
	if err := checkAddress(network, address); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	if len(fields) < 6 || fields[5] == "" {
		return errors.New("handshake: it has no TLS certificate, which PLUGIN_CLIENT_CERT asks for")
	}
	der, err := base64.RawStdEncoding.DecodeString(fields[5])
	if err == nil {
		_, err = x509.ParseCertificate(der)
	}
	if err != nil {
		return fmt.Errorf("handshake: its TLS certificate cannot be read: %w", err)
	}
	return nil
}

// checkAddress accepts an address that is reachable only from this machine.
func checkAddress(network, address string) error {
	switch network {
	case "unix":
		if strings.HasPrefix(address, "/") {
			return nil
		}
	case "tcp":
		host, _, err := net.SplitHostPort(address)
		if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsLoopback() {
			return nil
		}
	}
	return fmt.Errorf("its address %.20q %.200q is neither the absolute path of a unix socket nor a loopback tcp address", network, address)
}
