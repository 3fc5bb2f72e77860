package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	consulapi "github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/internal/version"
)

// consulParts is what a server uses Consul for.
type consulParts struct {
	store       *consul.Store
	clock       *consul.Clock
	name        string                          // for messages: "Consul at HOST:PORT"
	credentials map[string]credentials.Reloader // that may change
}

// newConsul returns what a server uses Consul for, and makes no request. What the
// configuration leaves empty comes from Consul's environment variables.
func newConsul(c config.Config, settings consul.Config, log hclog.Logger, observe ...consul.Observer) (consulParts, error) {
	own := c.Consul
	reach := consulapi.DefaultConfig()
	override(&reach.Address, own.Address)
	override(&reach.Datacenter, own.Datacenter)
	override(&reach.Namespace, own.Namespace)
	override(&reach.Partition, own.Partition)
	override(&reach.TLSConfig.CAFile, own.CAFile)
	override(&reach.TLSConfig.CertFile, own.CertFile)
	override(&reach.TLSConfig.KeyFile, own.KeyFile)
	override(&reach.TLSConfig.Address, own.TLSServerName)
	parts := consulParts{credentials: map[string]credentials.Reloader{}}
	token, err := parts.token(c, reach)
	if err != nil {
		return consulParts{}, err
	}
	if err := parts.secure(c, reach); err != nil {
		return consulParts{}, err
	}
	client, err := consul.NewClient(reach, token, observe...)
	if err != nil && own.Address == "" {
		return consulParts{}, fmt.Errorf("CONSUL_HTTP_ADDR: %w", err)
	}
	if err != nil {
		return consulParts{}, c.Wrong("consul.address", err)
	}
	parts.name = "Consul at " + reach.Address
	host, err := os.Hostname()
	if err != nil {
		return consulParts{}, fmt.Errorf("agent: %w", err)
	}
	log = log.Named("consul")
	parts.clock, err = consul.NewClock(client, c.KVPrefix, wall, log)
	if err != nil {
		return consulParts{}, c.Wrong("kv_prefix", err)
	}
	settings.Prefix, settings.Name, settings.Logger, settings.Clock = c.KVPrefix, host, log, parts.clock
	settings.Version, settings.Addresses = version.Get().Version, c.HTTPAddrs
	settings.Namespace, settings.Partition = reach.Namespace, reach.Partition
	parts.store, err = consul.New(client, settings)
	if err != nil {
		return consulParts{}, c.Wrong("kv_prefix", err)
	}
	return parts, nil
}

// replicasLimit is how long a description of the server waits for the list of replicas.
const replicasLimit = 2 * time.Second

// listReplicas returns a function that lists the replicas that run. It returns nil if
// Consul cannot be asked.
func listReplicas(store *consul.Store) func(context.Context) []wire.Replica {
	return func(ctx context.Context) []wire.Replica {
		ctx, cancel := context.WithTimeout(ctx, replicasLimit)
		defer cancel()
		listed, err := store.Replicas(ctx)
		if err != nil {
			return nil // the health check consul says why
		}
		all := make([]wire.Replica, len(listed))
		for i, r := range listed {
			all[i] = wire.Replica(r)
		}
		return all
	}
}

// token returns the configured token, or the one of the environment. A file has precedence
// there, as in Consul's own commands.
func (p *consulParts) token(c config.Config, environment *consulapi.Config) (*credentials.Token, error) {
	if c.Consul.Token != "" {
		return credentials.NewToken(c.Consul.Token), nil
	}
	path := cmp.Or(c.Consul.TokenFile, environment.TokenFile)
	if path == "" {
		return credentials.NewToken(environment.Token), nil
	}
	token, err := credentials.TokenFile(path)
	if err != nil && c.Consul.TokenFile == "" {
		return nil, fmt.Errorf("CONSUL_HTTP_TOKEN_FILE: %w", err)
	}
	if err != nil {
		return nil, c.Wrong("consul.token_file", err)
	}
	p.credentials["consul_token"] = token
	return token, nil
}

// secure makes the client use the current TLS files for each connection. It leaves the
// client alone if there are no files, or if the environment asks for what only Consul's own
// client can do: a folder of CAs, or no verification.
func (p *consulParts) secure(c config.Config, reach *consulapi.Config) error {
	own := reach.TLSConfig
	files := credentials.Files{CA: own.CAFile, Certificate: own.CertFile, Key: own.KeyFile}
	secure := reach.Scheme == "https" || strings.HasPrefix(reach.Address, "https://")
	if err := checkHTTPS(c, "consul", secure); err != nil {
		return err
	}
	if !secure || files == (credentials.Files{}) || own.CAPath != "" || own.InsecureSkipVerify {
		return nil
	}
	loaded, err := credentials.LoadTLS(files)
	if err != nil {
		return fmt.Errorf("agent: consul: %w", err)
	}
	p.credentials["consul_tls"] = loaded
	reach.Transport.DialTLSContext = loaded.Dial(own.Address)
	reach.Transport.TLSClientConfig = loaded.Client(own.Address) // for proxies
	return nil
}
