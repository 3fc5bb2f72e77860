// Command up runs Bivouac with a real Consul and a real Nomad on loopback until Ctrl-C, to
// try things out. It keeps no data.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/backoff"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// These are the programs' default ports. Other ports are used if these are
// taken.
const (
	consulPort  = 8500
	nomadPort   = 4646
	bivouacPort = 4747
)

// bivouacPath is the path of the built command below the top of the source tree, the same as
// for make build.
const bivouacPath = "bin/bivouac"

func main() {
	runtime.LockOSThread() // for Pdeathsig, which is sent when the thread that started the process ends
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run starts everything, waits until ctx or Bivouac ends, and stops everything, Bivouac
// first.
func run() (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	volume, user, err := makeVolume()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(filepath.Dir(volume))) }()
	fmt.Println("Starting Consul and Nomad. Where they have to be built first, that takes minutes.")
	consul, nomad, err := startBoth(ctx)
	defer func() {
		fmt.Println("Stopping.")
		if nomad != nil {
			err = errors.Join(err, nomad.Stop())
		}
		if consul != nil {
			err = errors.Join(err, consul.Stop())
		}
	}()
	if ctx.Err() != nil {
		return nil // ctx has ended, and what has started so far is stopped
	}
	if err != nil {
		return err
	}
	return serve(ctx, consul.Addr(), nomad, volume, user)
}

// serve builds Bivouac and runs it with that Consul and Nomad, for sandboxes with that
// volume. Containers run as that user.
func serve(ctx context.Context, consul string, cluster *stack.Nomad, volume, user string) (err error) {
	nomad := cluster.Addr()
	bin, err := filepath.Abs(bivouacPath)
	if err != nil {
		return err
	}
	if err := stack.BuildBivouac(ctx, bin); err != nil {
		return err
	}
	template, err := jobTemplate(ctx, user)
	if err != nil {
		return err
	}
	pool, removePool, err := startPool(ctx, cluster, bin, filepath.Dir(volume))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removePool()) }()
	consulBin, err := stack.ConsulBinary(ctx)
	if err != nil {
		return err
	}
	nomadBin, err := stack.NomadBinary(ctx)
	if err != nil {
		return err
	}
	port, err := stack.FreePort(bivouacPort)
	if err != nil {
		return err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)

	bivouac := exec.CommandContext(ctx, bin, append([]string{
		"agent", "-http-addr=" + addr, "-volume-root=" + filepath.Dir(volume),
	}, append(pool, template...)...)...)
	bivouac.Env = append(os.Environ(), "CONSUL_HTTP_ADDR="+consul, "NOMAD_ADDR=http://"+nomad)
	bivouac.Stdout, bivouac.Stderr = os.Stdout, os.Stderr
	// In its own process group. Otherwise it would get Ctrl-C twice: from the terminal and
	// from this program.
	bivouac.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	bivouac.Cancel = func() error { return bivouac.Process.Signal(syscall.SIGTERM) }
	bivouac.WaitDelay = 50 * time.Second // it ends by itself within 45
	if err := bivouac.Start(); err != nil {
		return err
	}
	alive, died := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		defer died()
		ended <- bivouac.Wait()
	}()
	err = waitHealthy(alive, addr)
	switch {
	case err == nil:
		fmt.Printf(help, consul, nomad, addr, volume, consulBin, nomadBin, strings.Join(template, " "), volume, addr)
	case alive.Err() == nil:
		err = errors.Join(err, bivouac.Cancel())
	}
	end := <-ended
	if ctx.Err() == nil {
		return errors.Join(err, errors.New("bivouac ended by itself"), end)
	}
	return nil // ctx has ended, and Bivouac too
}

// poolConfig is added to the configuration of the node helpers.
const poolConfig = `
pool "stack" {
  runtime = "nomad"
  size    = 2
}
`

// startPool starts a node helper for volumes below root, and returns flags for a pool of
// spares. It does nothing unless root runs this program. remove removes the helper's files.
func startPool(ctx context.Context, nomad *stack.Nomad, bin, root string) (flags []string, remove func() error, err error) {
	if os.Getuid() != 0 {
		fmt.Println("There will be no pool of spares: a node helper needs root.")
		return nil, func() error { return nil }, nil
	}
	helpers, err := stack.StartHelpers(ctx, nomad, bin, root)
	if err != nil {
		return nil, nil, err
	}
	file, err := os.CreateTemp("", "bivouac-pool-*.hcl")
	if err == nil {
		_, err = file.WriteString(helpers.Config + poolConfig)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return nil, nil, errors.Join(err, helpers.Stop())
	}
	remove = func() error { return errors.Join(helpers.Stop(), os.Remove(file.Name())) }
	return []string{"-config=" + file.Name()}, remove, nil
}

func startBoth(ctx context.Context) (consul *stack.Consul, nomad *stack.Nomad, err error) {
	consulAt, err := stack.FreePort(consulPort)
	if err != nil {
		return nil, nil, err
	}
	nomadAt, err := stack.FreePort(nomadPort)
	if err != nil {
		return nil, nil, err
	}
	both, ctx := errgroup.WithContext(ctx)
	both.Go(func() (err error) {
		consul, err = stack.StartConsul(ctx, stack.ConsulConfig{HTTPPort: consulAt})
		return err
	})
	both.Go(func() (err error) {
		nomad, err = stack.StartNomad(ctx, stack.NomadConfig{HTTPPort: nomadAt})
		return err
	})
	err = both.Wait()
	return consul, nomad, err
}

// nobody is the user that sandboxes run as if root runs this program.
const nobody = 65534

// makeVolume makes a directory for a sandbox, alone in another one. It returns the directory
// and its owner as UID:GID: the user who runs this program, or nobody if that is root.
func makeVolume() (volume, user string, err error) {
	root, err := os.MkdirTemp("", "bivouac-volumes-")
	if err != nil {
		return "", "", err
	}
	volume = filepath.Join(root, "demo")
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = nobody, nobody
	}
	const text = "This folder is the volume of the sandbox that make stack offers to make.\n"
	err = os.Mkdir(volume, 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(volume, "README"), []byte(text), 0o600)
	}
	for _, path := range []string{filepath.Join(volume, "README"), volume} {
		if err == nil {
			err = os.Chown(path, uid, gid)
		}
	}
	if err != nil {
		return "", "", errors.Join(err, os.RemoveAll(root))
	}
	return volume, fmt.Sprintf("%d:%d", uid, gid), nil
}

// jobTemplate returns the flags for sandboxes in containers, which run as user, if a Docker
// engine answers. Otherwise sandboxes are plain processes.
func jobTemplate(ctx context.Context, user string) ([]string, error) {
	const logs = "-job-var=logs=true"
	if err := stack.DockerEngine(ctx); err != nil {
		fmt.Println("Sandboxes will be plain processes:", err)
		return []string{"-job-template=raw_exec", logs}, nil
	}
	image, err := stack.DemoImage(ctx)
	return []string{"-job-template=docker", "-job-var=image=" + image, "-job-var=user=" + user, logs}, err
}

// waitHealthy waits until the server is healthy.
func waitHealthy(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client, err := apiclient.New(addr, nil)
	if err != nil {
		return err
	}
	for {
		if _, err = client.Health(ctx); err == nil {
			return nil
		}
		if backoff.Sleep(ctx, 50*time.Millisecond) != nil {
			return fmt.Errorf("bivouac is not healthy: %w", err)
		}
	}
}

// help is a format for the addresses of Consul, Nomad and Bivouac, the volume, the paths of
// Consul and Nomad, the flags of the job template, the volume again, and the address of
// Bivouac again.
const help = `
Bivouac runs on a real Consul and a real Nomad. In another terminal:

  export CONSUL_HTTP_ADDR=%s NOMAD_ADDR=http://%s BIVOUAC_ADDR=http://%s

  curl -X PUT -H 'Content-Type: application/json' \
    -d '{"agent_id":"agent-1","volume_host_path":"%s"}' \
    $BIVOUAC_ADDR/v1/sessions/4b825dc6-42cb-4e8b-a6e0-0123456789ab

  bin/bivouac session list
  bin/bivouac session why 4b825dc6-42cb-4e8b-a6e0-0123456789ab
  bin/bivouac events
  %s kv get -recurse
  %s job status

The first answers with the endpoint of a sandbox (%s).
Its volume is %s, which is removed at the end.
The others show the session, what happened to it, its record in Consul and its job in
Nomad. See the sessions at http://%s/ui/ in a browser. Ctrl-C stops all of it.

`
