package stack

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// DockerEngine returns nil where a Docker engine answers, found as the docker
// command finds it (DOCKER_HOST, contexts, the default socket).
func DockerEngine(ctx context.Context) error {
	_, err := docker(ctx, nil, "version", "--format={{.Server.Version}}")
	return err
}

// demoImage is the name of the image that [DemoImage] makes.
const demoImage = "bivouac-demo:dev"

// DemoImage makes an image of nothing but the bivouac of this source tree, which
// runs "bivouac demo-sandbox", and returns its name. No registry is asked.
func DemoImage(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "bivouac-image-")
	if err != nil {
		return "", fmt.Errorf("stack: make %s: %w", demoImage, err)
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "bivouac")
	if err := BuildBivouac(ctx, bin); err != nil {
		return "", err
	}
	layer, err := tarOf(bin)
	if err != nil {
		return "", fmt.Errorf("stack: make %s: %w", demoImage, err)
	}
	// An import needs no builder, which is a plugin that not every docker has.
	_, err = docker(ctx, layer, "import",
		`--change=ENTRYPOINT ["/bivouac", "demo-sandbox"]`, "-", demoImage)
	return demoImage, err
}

// BuildBivouac builds cmd/bivouac of this source tree to the file out, as a
// static binary that runs in an empty file system too.
func BuildBivouac(ctx context.Context, out string) error {
	root, err := moduleRoot(ctx)
	if err != nil {
		return fmt.Errorf("stack: build bivouac: %w", err)
	}
	if err := goBuild(ctx, root, "./cmd/bivouac", out, "CGO_ENABLED=0"); err != nil {
		return fmt.Errorf("stack: build bivouac: %w", err)
	}
	return nil
}

// tarOf archives one program, at the top.
func tarOf(path string) (io.Reader, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	header := &tar.Header{Name: filepath.Base(path), Mode: 0o755, Size: int64(len(data))}
	if err := w.WriteHeader(header); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	return &out, w.Close()
}

// docker runs the docker command and returns what it prints.
func docker(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "docker", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("stack: docker %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}
