package stack

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/node/nodeapi"
	"github.com/bivouac/bivouac/internal/test/certs"
)

// Helpers are node helpers that run on all clients of a Nomad.
type Helpers struct {
	dir string

	// Config is the part of a Bivouac server's configuration that lets it call them.
	Config string
}

// fatal ends the process if certificates cannot be made.
type fatal struct{}

func (fatal) Helper()                           {}
func (fatal) Fatalf(format string, args ...any) { log.Fatalf(format, args...) }

// StartHelpers runs a node helper on each client of nomad, as a system job of Nomad, and
// returns once it is registered. bin is the path of Bivouac's program. The helpers bind
// volumes below root. They need root, and end with nomad.
func StartHelpers(ctx context.Context, nomad *Nomad, bin, root string) (*Helpers, error) {
	dir, err := os.MkdirTemp("", "bivouac-helpers-")
	if err != nil {
		return nil, err
	}
	h := &Helpers{dir: dir}
	if err := h.start(ctx, nomad, bin, root); err != nil {
		return nil, fmt.Errorf("start node helpers: %w", errors.Join(err, h.Stop()))
	}
	return h, nil
}

func (h *Helpers) start(ctx context.Context, nomad *Nomad, bin, root string) error {
	ca := certs.NewCA(fatal{})
	files := map[string][3]string{}
	for _, name := range []string{nodeapi.ServerName, nodeapi.ClientName} {
		dir := filepath.Join(h.dir, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		caFile, certFile, keyFile := certs.Write(fatal{}, dir, ca, ca.Issue(fatal{}, name))
		files[name] = [3]string{caFile, certFile, keyFile}
	}
	mine := files[nodeapi.ClientName]
	h.Config = fmt.Sprintf("nomad {\n  helper_ca_file   = %q\n  helper_cert_file = %q\n  helper_key_file  = %q\n}\n", mine[0], mine[1], mine[2])

	client, err := nomad.Client()
	if err != nil {
		return err
	}
	if _, _, err := client.Jobs().Register(helperJob(bin, root, files[nodeapi.ServerName]), (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		nodes, _, err := client.Nodes().List((&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		services, _, err := client.Services().Get(nodeapi.Service, (&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		if len(services) >= len(nodes) {
			return nil
		}
		if err := backoff.Sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("%d of %d node helpers are registered: %w", len(services), len(nodes), err)
		}
	}
}

func helperJob(bin, root string, files [3]string) *api.Job {
	task := api.NewTask("node", "raw_exec").SetConfig("command", bin).SetConfig("args", []string{
		"node", "-http-addr=${NOMAD_ADDR_https}", "-volume-root=" + root,
		"-tls-client-ca-file=" + files[0], "-tls-cert-file=" + files[1], "-tls-key-file=" + files[2],
	})
	task.Resources = &api.Resources{CPU: new(10), MemoryMB: new(32)}
	group := api.NewTaskGroup("node", 1).AddTask(task)
	// A helper that ends is started again, for as long as it takes.
	group.RestartPolicy = &api.RestartPolicy{
		Attempts: new(10), Interval: new(time.Minute), Delay: new(time.Second), Mode: new("delay"),
	}
	group.Networks = []*api.NetworkResource{{DynamicPorts: []api.Port{{Label: "https"}}}}
	group.Services = []*api.Service{{Name: nodeapi.Service, PortLabel: "https", Provider: "nomad"}}
	return &api.Job{
		ID: new(nodeapi.Service), Name: new(nodeapi.Service), Type: new(api.JobTypeSystem),
		Datacenters: []string{"*"}, TaskGroups: []*api.TaskGroup{group},
	}
}

// Stop removes the files of the helpers. The helpers themselves end with their Nomad.
func (h *Helpers) Stop() error { return os.RemoveAll(h.dir) }
