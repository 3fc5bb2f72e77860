package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime/nomad"
	"github.com/bivouac/bivouac/scheduler"
)

// nomadParts is what a server uses Nomad for.
type nomadParts struct {
	nomadConnection
	driver *nomad.Driver
	place  func(context.Context) (consul.Place, error) // where in Nomad the sandboxes run
}

// nomadConnection is how a server reaches Nomad.
type nomadConnection struct {
	client      *nomadapi.Client
	settings    *nomadapi.Config
	token       *credentials.Token              // is sent with each request; the client has none
	credentials map[string]credentials.Reloader // that may change
}

// connectNomad returns a connection, and makes no request. What the configuration leaves
// empty comes from Nomad's environment variables.
func connectNomad(c config.Config) (nomadConnection, error) {
	settings := nomadapi.DefaultConfig()
	override(&settings.Address, c.Nomad.Address)
	override(&settings.Region, c.Nomad.Region)
	override(&settings.Namespace, c.Nomad.Namespace)
	override(&settings.SecretID, c.Nomad.Token)
	override(&settings.TLSConfig.CACert, c.Nomad.CAFile)
	override(&settings.TLSConfig.ClientCert, c.Nomad.CertFile)
	override(&settings.TLSConfig.ClientKey, c.Nomad.KeyFile)
	override(&settings.TLSConfig.TLSServerName, c.Nomad.TLSServerName)
	connection := nomadConnection{settings: settings, credentials: map[string]credentials.Reloader{}}
	if err := connection.setToken(c); err != nil {
		return nomadConnection{}, err
	}
	if err := connection.secure(c); err != nil {
		return nomadConnection{}, fmt.Errorf("agent: nomad: %w", err)
	}
	var err error
	if connection.client, err = nomadapi.NewClient(settings); err != nil {
		return nomadConnection{}, fmt.Errorf("agent: nomad: %w", err)
	}
	return connection, nil
}

// newNomad returns what a server uses Nomad for, and makes no request.
func newNomad(c config.Config, observe consul.Observer, log hclog.Logger) (nomadParts, error) {
	connection, err := connectNomad(c)
	if err != nil {
		return nomadParts{}, err
	}
	parts := nomadParts{nomadConnection: connection}
	variables, err := jobVariables(c)
	if err != nil {
		return nomadParts{}, err
	}
	template, err := jobs.Load(c.JobTemplate, variables)
	if err != nil {
		return nomadParts{}, fmt.Errorf("agent: job_template: %w", err)
	}
	if err := checkNomadPools(c, template); err != nil {
		return nomadParts{}, err
	}
	settings := nomad.Config{
		Client: parts.client, Token: parts.token, Template: template, Logger: log.Named("nomad"), Observe: observe,
		Region: parts.settings.Region, HelperNamespace: c.Nomad.HelperNamespace,
	}
	if c.Nomad.HelperCAFile != "" {
		if settings.Helper, err = parts.connectHelpers(c); err != nil {
			return nomadParts{}, err
		}
	}
	parts.driver, err = nomad.New(settings)
	if err != nil {
		return nomadParts{}, fmt.Errorf("agent: %w", err)
	}
	namespace := cmp.Or(template.Namespace(), parts.settings.Namespace)
	parts.place = place(parts.client, parts.token, parts.settings.Region, namespace, c.Runtime == nomadName)
	return parts, nil
}

// setToken takes the configured token, or the one of the environment.
func (n *nomadConnection) setToken(c config.Config) error {
	n.token = credentials.NewToken(n.settings.SecretID)
	n.settings.SecretID = ""
	if c.Nomad.TokenFile == "" {
		return nil
	}
	var err error
	if n.token, err = credentials.TokenFile(c.Nomad.TokenFile); err != nil {
		return c.Wrong("nomad.token_file", err)
	}
	n.credentials["nomad_token"] = n.token
	return nil
}

const (
	maxIdle   = 32               // connections to Nomad that are kept while they are not used
	idleLimit = 90 * time.Second // how long they are kept

	// maxHelperConns is how many connections to one node helper there are at most. An order
	// takes a few milliseconds, less than a new connection.
	maxHelperConns = 16
)

// secure sets the HTTP client of the settings to one that uses the current TLS files for each
// connection. It leaves settings alone if there are no files, or if the environment asks
// for what only Nomad's own client can do: a folder of CAs, or no verification.
func (n *nomadConnection) secure(c config.Config) error {
	own := n.settings.TLSConfig
	secure := strings.HasPrefix(n.settings.Address, "https://")
	if err := checkHTTPS(c, "nomad", secure); err != nil {
		return err
	}
	files := credentials.Files{CA: own.CACert, Certificate: own.ClientCert, Key: own.ClientKey}
	if !secure || files == (credentials.Files{}) || own.CAPath != "" || own.Insecure {
		return nil
	}
	loaded, err := credentials.LoadTLS(files)
	if err != nil {
		return err
	}
	n.credentials["nomad_tls"] = loaded
	n.settings.HttpClient = &http.Client{Transport: &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialTLSContext:      loaded.Dial(own.TLSServerName),
		TLSClientConfig:     loaded.Client(own.TLSServerName), // for proxies and websockets
		MaxIdleConnsPerHost: maxIdle,
		IdleConnTimeout:     idleLimit,
	}}
	return nil
}

// checkNomadPools refuses a pool that could never be filled.
func checkNomadPools(c config.Config, template *jobs.Template) error {
	i := slices.IndexFunc(c.Pools, func(p scheduler.Pool) bool { return p.Runtime == nomadName }) // a runtime has one pool
	if i < 0 {
		return nil
	}
	err := template.Spares()
	if err == nil && c.Nomad.HelperCAFile == "" {
		err = errors.New("spares of nomad need node helpers (bivouac node): set helper_ca_file, helper_cert_file and helper_key_file in the block nomad")
	}
	if err != nil {
		return c.Wrong("pool."+c.Pools[i].Name, err)
	}
	return nil
}

// connectHelpers returns a client of the node helpers that uses the current TLS files for
// each connection.
func (n *nomadConnection) connectHelpers(c config.Config) (nomad.Helper, error) {
	loaded, err := credentials.LoadTLS(credentials.Files{
		CA: c.Nomad.HelperCAFile, Certificate: c.Nomad.HelperCertFile, Key: c.Nomad.HelperKeyFile,
	})
	if err != nil {
		return nil, fmt.Errorf("agent: node helpers: %w", err)
	}
	n.credentials["helper_tls"] = loaded
	return nodeapi.New(&http.Client{Transport: &http.Transport{
		DialTLSContext:      loaded.Dial(nodeapi.ServerName),
		MaxConnsPerHost:     maxHelperConns,
		MaxIdleConnsPerHost: maxHelperConns,
		IdleConnTimeout:     idleLimit,
	}}), nil
}

// jobVariables returns the configured job variables. Without a command, the raw_exec
// template runs this program as its demo sandbox.
func jobVariables(c config.Config) (map[string]string, error) {
	if _, told := c.JobVars["command"]; told || c.JobTemplate != "raw_exec" {
		return c.JobVars, nil
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("agent: find this program: %w", err)
	}
	variables := map[string]string{"command": self}
	maps.Copy(variables, c.JobVars)
	return variables, nil
}
