package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// replica is one running Bivouac server.
type replica struct {
	*stack.Bivouac
	api    *apiclient.Client
	volume string
}

// replicaConfig holds the addresses of a replica's servers, its key prefix and
// its job template.
type replicaConfig struct {
	consul, nomad, prefix, template string
	flags                           []string // more flags
	token                           string   // of the caller; empty: none
}

// instanceOf returns the instance name for a key prefix.
func instanceOf(prefix string) string {
	return strings.ReplaceAll(strings.Trim(prefix, "/"), "_", "-")
}

// startReplica starts a Bivouac server and waits until it is healthy. Its
// cleanup interval is so long that it cleans up nothing by itself.
func (w *world) startReplica(ctx context.Context, c replicaConfig) (*replica, error) {
	volume, err := w.volume()
	if err != nil {
		return nil, err
	}
	port, err := stack.FreePort(0)
	if err != nil {
		return nil, err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	flags := []string{"-kv-prefix=" + c.prefix + "/", "-instance=" + instanceOf(c.prefix), "-job-template=" + c.template,
		"-cleanup-interval=1h", "-log-level=warn"}
	if c.template == "docker" {
		flags = append(flags, "-job-var=image="+w.image)
	}
	flags = append(flags, c.flags...)
	server, err := stack.NewBivouac(c.prefix, w.binary, addr, filepath.Join(w.dir, c.prefix+".log"),
		append(os.Environ(), "CONSUL_HTTP_ADDR="+c.consul, "NOMAD_ADDR=http://"+c.nomad), flags...)
	if err != nil {
		return nil, err
	}
	client, err := apiclient.New(addr, nil)
	if err != nil {
		return nil, err
	}
	if err := server.Start(); err != nil {
		return nil, err
	}
	if err := server.WaitReady(ctx); err != nil {
		return nil, errors.Join(err, server.Stop())
	}
	return &replica{Bivouac: server, api: client.WithToken(c.token), volume: volume}, nil
}

func (r *replica) create(ctx context.Context, chat uuid.UUID) error {
	_, err := r.createContainer(ctx, chat)
	return err
}

// createContainer is like create. It also returns the ID of the chat's container.
func (r *replica) createContainer(ctx context.Context, chat uuid.UUID) (string, error) {
	answer, err := r.api.Create(ctx, chat, apiclient.CreateInput{AgentID: "bench", VolumeHostPath: r.volume})
	return answer.Session.ContainerID, err
}

func (r *replica) delete(ctx context.Context, chat uuid.UUID) error {
	_, err := r.api.Delete(ctx, chat)
	return err
}
