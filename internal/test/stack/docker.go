package stack

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// DockerEngine returns nil if a Docker engine answers. It finds the engine as the docker
// command does (DOCKER_HOST, contexts, the default socket).
func DockerEngine(ctx context.Context) error {
	_, err := docker(ctx, nil, "version", "--format={{.Server.Version}}")
	return err
}

// demoImage is the name of the image that [DemoImage] makes.
const demoImage = "bivouac-demo:dev"

// DemoImage makes an image that contains only the bivouac binary of this source tree and
// runs "bivouac demo-sandbox". It returns the image's name. It uses no registry, and keeps
// an existing image of the same binary.
func DemoImage(ctx context.Context) (name string, err error) {
	dir, err := os.MkdirTemp("", "bivouac-image-")
	if err != nil {
		return "", fmt.Errorf("stack: make %s: %w", demoImage, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	bin := filepath.Join(dir, "bivouac")
	if err := BuildBivouac(ctx, bin); err != nil {
		return "", err
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return "", fmt.Errorf("stack: make %s: %w", demoImage, err)
	}
	return demoImage, importImage(ctx, demoImage, program)
}

// digestLabel is the label with the digest of the program in an image.
const digestLabel = "bivouac.digest"

// importImage makes an image with that name that runs the program, unless it exists.
func importImage(ctx context.Context, name string, program []byte) error {
	digest := fmt.Sprintf("%x", sha256.Sum256(program))
	// An error most likely means that there is no such image. Others show up below.
	stands, err := docker(ctx, nil, "image", "inspect",
		"--format={{index .Config.Labels "+strconv.Quote(digestLabel)+"}}", name)
	if err == nil && stands == digest {
		return nil
	}
	layer, err := archive("bivouac", program)
	if err != nil {
		return fmt.Errorf("stack: make %s: %w", name, err)
	}
	// An import needs no builder, a plugin that not every docker has.
	if _, err := docker(ctx, layer, "import",
		"--change=LABEL "+digestLabel+"="+digest,
		`--change=ENTRYPOINT ["/bivouac", "demo-sandbox"]`,
		"-", name); err != nil {
		return err
	}
	// Remove the image that had the name before, unless a container still runs it.
	_, err = docker(ctx, nil, "image", "prune", "--force", "--filter=label="+digestLabel)
	return err
}

// BuildBivouac builds cmd/bivouac of this source tree to the file out, with optional build
// tags. The binary is static, so it also runs in an empty file system.
func BuildBivouac(ctx context.Context, out string, tags ...string) error {
	root, err := moduleRoot(ctx)
	if err != nil {
		return fmt.Errorf("stack: build bivouac: %w", err)
	}
	if err := goBuild(ctx, root, "./cmd/bivouac", out, tags, "CGO_ENABLED=0"); err != nil {
		return fmt.Errorf("stack: build bivouac: %w", err)
	}
	return nil
}

// archive returns a tar archive with one program in it, at the top.
func archive(name string, program []byte) (io.Reader, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
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
