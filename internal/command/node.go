package command

import (
	"context"
	"errors"
	"flag"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/node"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
)

func nodeCommand(t terminal) *command {
	c := newCommand(t, "node")
	c.synopsis = "Run the node helper"
	c.about = `Runs the node helper until it receives SIGINT or SIGTERM. Run one as root on
each Nomad client that has sandboxes, if Bivouac has pools. When a chat gets a
sandbox that already runs, the helper mounts the chat's volume in it.

The helper accepts only two orders, to look at a sandbox and to bind a volume
to it. It binds only volumes below its own volume roots. Bivouac servers need a
client certificate of the CA in -tls-client-ca-file, with the name in
-tls-client-name. Certificates are read again when they change, and on SIGHUP.`
	c.example = `$ bivouac node -http-addr=10.0.0.5:4748 -volume-root=/srv/chats \
    -tls-client-ca-file=ca.pem -tls-cert-file=node.pem -tls-key-file=node-key.pem`
	settings := node.Config{ClientName: nodeapi.ClientName, HTTPAddr: "127.0.0.1:4748", LogLevel: "info"}
	registerNodeFlags(c.flags, &settings)
	c.run = func(ctx context.Context, _ []string) error {
		hangups, done := survive()
		defer done()
		return node.Run(ctx, settings, c.err, hangups)
	}
	return c
}

func registerNodeFlags(flags *flag.FlagSet, c *node.Config) {
	flags.StringVar(&c.HTTPAddr, "http-addr", c.HTTPAddr, "`ADDRESS` to listen on, HOST:PORT.")
	flags.Func("volume-root", "`FOLDER` that has volumes, at any depth. May be repeated. At least one is required.", func(root string) error {
		c.VolumeRoots = append(c.VolumeRoots, root)
		return nil
	})
	flags.StringVar(&c.TLS.CA, "tls-client-ca-file", "", "`FILE` with the CAs of the certificates of Bivouac servers. Required.")
	flags.StringVar(&c.TLS.Certificate, "tls-cert-file", "", "`FILE` with the helper's certificate, which must have the name "+nodeapi.ServerName+". Required.")
	flags.StringVar(&c.TLS.Key, "tls-key-file", "", "`FILE` with the certificate's key. Required.")
	flags.StringVar(&c.ClientName, "tls-client-name", c.ClientName, "DNS `NAME` that the certificates of Bivouac servers must have.")
	flags.Func("log-level", "`LEVEL` of the log: trace, debug, info, warn or error. (default info)", func(level string) error {
		if hclog.LevelFromString(level) == hclog.NoLevel {
			return errors.New("must be trace, debug, info, warn or error")
		}
		c.LogLevel = level
		return nil
	})
	flags.BoolVar(&c.LogJSON, "log-json", false, "Write the log as JSON.")
}
