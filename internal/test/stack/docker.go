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

// DockerEngine returns nil where a Docker engine answers, found as the docker
// command finds it (DOCKER_HOST, contexts, the default socket).
func DockerEngine(ctx context.Context) error {
	_, err := docker(ctx, nil, "version", "--format={{.Server.Version}}")
	return err
}

// demoImage is the name of the image that [DemoImage] makes.
const demoImage = "bivouac-demo:dev"

// DemoImage makes an image of nothing but the bivouac of this source tree, which
// runs "bivouac demo-sandbox", and returns its name. No registry is asked. An image
// that stands already, made of the same binary, is left as it is.
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

// digestLabel says of which program an image was made.
const digestLabel = "bivouac.digest"

// importImage makes the image of that name run the program, if it does not yet.
func importImage(ctx context.Context, name string, program []byte) error {
	digest := fmt.Sprintf("%x", sha256.Sum256(program))
	// An error is most likely that there is no such image. Others will show.
	stands, err := docker(ctx, nil, "image", "inspect",
		"--format={{index .Config.Labels "+strconv.Quote(digestLabel)+"}}", name)
	if err == nil && stands == digest {
		return nil
	}
	layer, err := archive("bivouac", program)
	if err != nil {
		return fmt.Errorf("stack: make %s: %w", name, err)
	}
	// An import needs no builder, which is a plugin that not every docker has.
	if _, err := docker(ctx, layer, "import",
		"--change=LABEL "+digestLabel+"="+digest,
		`--change=ENTRYPOINT ["/bivouac", "demo-sandbox"]`,
		"-", name); err != nil {
		return err
	}
	// The one that had the name before goes, unless a container still runs it.
	_, err = docker(ctx, nil, "image", "prune", "--force", "--filter=label="+digestLabel)
	return err
}

// BuildBivouac builds cmd/bivouac of this source tree to the file out, as a
// static binary that runs in an empty file system too. Build tags may be given.
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
