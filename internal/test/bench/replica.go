package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// replica is one running Bivouac server.
type replica struct {
	api    *apiclient.Client
	volume string
	cmd    *exec.Cmd
	log    *os.File
}

// replicaConfig holds the addresses of a replica's servers, its key prefix and
// its job template.
type replicaConfig struct {
	consul, nomad, prefix, template string
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
	args := []string{"agent", "-http-addr=" + addr, "-kv-prefix=" + c.prefix + "/", "-instance=" + instanceOf(c.prefix),
		"-job-template=" + c.template, "-cleanup-interval=1h", "-log-level=warn"}
	if c.template == "docker" {
		args = append(args, "-job-var=image="+w.image)
	}
	log, err := os.Create(filepath.Join(w.dir, c.prefix+".log"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(w.binary, args...) // ended by stop, not by ctx, so that it shuts down in order
	cmd.Env = append(os.Environ(), "CONSUL_HTTP_ADDR="+c.consul, "NOMAD_ADDR=http://"+c.nomad)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	client, err := apiclient.New(addr, nil)
	if err != nil {
		return nil, err
	}
	r := &replica{api: client, volume: volume, cmd: cmd, log: log}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for tick := time.Tick(20 * time.Millisecond); ; {
		if _, err = r.api.Health(ctx); err == nil {
			return r, nil
		}
		select {
		case <-tick:
		case <-ctx.Done():
			_ = r.stop() // the first error is more useful
			text, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("replica %s is not healthy: %w; its log: %s", c.prefix, err, text)
		}
	}
}

func (r *replica) stop() error {
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	if err := r.cmd.Wait(); err != nil {
		return err
	}
	return r.log.Close()
}

func (r *replica) create(ctx context.Context, chat uuid.UUID) error {
	_, err := r.api.Create(ctx, chat, apiclient.CreateInput{AgentID: "bench", VolumeHostPath: r.volume})
	return err
}

func (r *replica) delete(ctx context.Context, chat uuid.UUID) error {
	_, err := r.api.Delete(ctx, chat)
	return err
}
