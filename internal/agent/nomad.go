package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strings"

	"github.com/hashicorp/go-hclog"
	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime/nomad"
)

// nomadParts is what a server uses Nomad for.
type nomadParts struct {
	driver      *nomad.Driver
	place       func(context.Context) (consul.Place, error) // where in Nomad the sandboxes run
	credentials map[string]credentials.Reloader             // that may change
}

// newNomad returns what a server uses Nomad for, and makes no request. What the
// configuration leaves empty comes from Nomad's environment variables.
func newNomad(c config.Config, observe consul.Observer, log hclog.Logger) (nomadParts, error) {
	settings := nomadapi.DefaultConfig()
	override(&settings.Address, c.Nomad.Address)
	override(&settings.Region, c.Nomad.Region)
	override(&settings.Namespace, c.Nomad.Namespace)
	override(&settings.SecretID, c.Nomad.Token)
	override(&settings.TLSConfig.CACert, c.Nomad.CAFile)
	override(&settings.TLSConfig.ClientCert, c.Nomad.CertFile)
	override(&settings.TLSConfig.ClientKey, c.Nomad.KeyFile)
	override(&settings.TLSConfig.TLSServerName, c.Nomad.TLSServerName)
	parts := nomadParts{credentials: map[string]credentials.Reloader{}}
	token, err := parts.token(c, settings)
	if err != nil {
		return nomadParts{}, err
	}
	if err := parts.secure(settings); err != nil {
		return nomadParts{}, fmt.Errorf("agent: nomad: %w", err)
	}
	client, err := nomadapi.NewClient(settings)
	if err != nil {
		return nomadParts{}, fmt.Errorf("agent: nomad: %w", err)
	}
	variables, err := jobVariables(c)
	if err != nil {
		return nomadParts{}, err
	}
	template, err := jobs.Load(c.JobTemplate, variables)
	if err != nil {
		return nomadParts{}, fmt.Errorf("agent: job_template: %w", err)
	}
	parts.driver, err = nomad.New(nomad.Config{
		Client: client, Token: token, Template: template, Logger: log.Named("nomad"), Observe: observe,
	})
	if err != nil {
		return nomadParts{}, fmt.Errorf("agent: %w", err)
	}
	namespace := cmp.Or(template.Namespace(), settings.Namespace)
	parts.place = place(client, token, settings.Region, namespace, c.Runtime == nomadName)
	return parts, nil
}

// token returns the configured token, or the one of the environment. It is sent with each
// request, so the client itself has none.
func (p *nomadParts) token(c config.Config, settings *nomadapi.Config) (*credentials.Token, error) {
	value := settings.SecretID
	settings.SecretID = ""
	if c.Nomad.TokenFile == "" {
		return credentials.NewToken(value), nil
	}
	token, err := credentials.TokenFile(c.Nomad.TokenFile)
	if err != nil {
		return nil, c.Wrong("nomad.token_file", err)
	}
	p.credentials["nomad_token"] = token
	return token, nil
}

// maxIdle is how many connections to Nomad are kept while they are not used.
const maxIdle = 32

// secure sets the HTTP client of settings to one that uses the current TLS files for each
// connection. It leaves settings alone if there are no files, or if the environment asks
// for what only Nomad's own client can do: a folder of CAs, or no verification.
func (p *nomadParts) secure(settings *nomadapi.Config) error {
	own := settings.TLSConfig
	files := credentials.Files{CA: own.CACert, Certificate: own.ClientCert, Key: own.ClientKey}
	if !strings.HasPrefix(settings.Address, "https://") || files == (credentials.Files{}) || own.CAPath != "" || own.Insecure {
		return nil
	}
	loaded, err := credentials.LoadTLS(files)
	if err != nil {
		return err
	}
	p.credentials["nomad_tls"] = loaded
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.ForceAttemptHTTP2 = false // Nomad's API has connections that are upgraded
	transport.MaxIdleConnsPerHost = maxIdle
	transport.DialTLSContext = loaded.Dial(own.TLSServerName)
	transport.TLSClientConfig = loaded.Client(own.TLSServerName) // for proxies and websockets
	settings.HttpClient = &http.Client{Transport: transport}
	return nil
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
