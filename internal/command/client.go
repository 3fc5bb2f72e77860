package command

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/credentials"
)

// The environment variables of commands that call the API.
const (
	addressEnv    = "BIVOUAC_ADDR"
	tokenEnv      = "BIVOUAC_TOKEN"      //nolint:gosec // the name of a variable
	tokenFileEnv  = "BIVOUAC_TOKEN_FILE" //nolint:gosec // the name of a variable
	caCertEnv     = "BIVOUAC_CACERT"
	clientCertEnv = "BIVOUAC_CLIENT_CERT"
	clientKeyEnv  = "BIVOUAC_CLIENT_KEY"
	serverNameEnv = "BIVOUAC_TLS_SERVER_NAME"
)

// server is how a command reaches its server.
type server struct {
	address    string
	token      string // overridden by tokenFile
	tokenFile  string
	files      credentials.Files
	serverName string
}

// clientFlags adds the flags of all commands that call the API. Call the returned
// function after the flags are parsed: it returns the client. The token has no flag,
// because other users of the machine can read a command's arguments.
func clientFlags(c *command) func() (*apiclient.Client, error) {
	s := server{address: "http://127.0.0.1:4747", token: c.getenv(tokenEnv)}
	for _, f := range []struct {
		target           *string
		flag, env, usage string
	}{
		{&s.address, "address", addressEnv, "`URL` of the server: http, https or unix:///PATH."},
		{&s.tokenFile, "token-file", tokenFileEnv, "`FILE` with the token, instead of " + tokenEnv + "."},
		{&s.files.CA, "ca-cert", caCertEnv, "PEM `FILE` of the CAs to trust. The default is those of the system."},
		{&s.files.Certificate, "client-cert", clientCertEnv, "PEM `FILE` of the certificate to present."},
		{&s.files.Key, "client-key", clientKeyEnv, "PEM `FILE` of the certificate's key."},
		{&s.serverName, "tls-server-name", serverNameEnv, "`NAME` in the server's certificate. The default is the host of the address."},
	} {
		*f.target = cmp.Or(c.getenv(f.env), *f.target)
		c.flags.StringVar(f.target, f.flag, *f.target, f.usage+" Overrides "+f.env+".")
	}
	return s.client
}

func (s *server) client() (*apiclient.Client, error) {
	token := credentials.NewToken(s.token)
	if s.tokenFile != "" {
		var err error
		if token, err = credentials.TokenFile(s.tokenFile); err != nil {
			return nil, err
		}
	}
	transport, err := s.transport()
	if err != nil {
		return nil, err
	}
	client, err := apiclient.New(s.address, transport)
	if err != nil {
		return nil, err
	}
	return client.WithToken(token.Value()), nil
}

// transport returns nil if the address is not https.
func (s *server) transport() (http.RoundTripper, error) {
	if !strings.HasPrefix(s.address, "https://") {
		return nil, nil
	}
	files, err := credentials.LoadTLS(s.files)
	if err != nil {
		return nil, fmt.Errorf("%w (see %s, %s and %s)", err, caCertEnv, clientCertEnv, clientKeyEnv)
	}
	return &http.Transport{
		Proxy:           http.ProxyFromEnvironment,
		DialTLSContext:  files.Dial(s.serverName),
		TLSClientConfig: files.Client(s.serverName), // for proxies
	}, nil
}

// hint says which variable can help against an error, or "".
func hint(err error) string {
	if e, ok := errors.AsType[*apiclient.Error](err); ok {
		switch {
		case e.Status == http.StatusUnauthorized:
			return "Set " + tokenEnv + " or " + tokenFileEnv + " to a token that this server knows."
		case e.Code == wire.CodePermissionDenied:
			return "The token in " + tokenEnv + " or " + tokenFileEnv + " does not allow this; use another one."
		case e.Code == wire.CodeClientCertificateRequired:
			return "Set " + clientCertEnv + " and " + clientKeyEnv + " to a certificate that this server trusts."
		}
		return ""
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "Set " + caCertEnv + " to the CA of the server's certificate."
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "Set " + serverNameEnv + " to a name in the server's certificate."
	}
	return ""
}
