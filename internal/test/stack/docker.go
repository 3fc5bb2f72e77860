package stack

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
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

// DemoImage makes an image that runs "bivouac demo-sandbox" of this source tree. It
// returns the image's name. If this machine has a static busybox (Debian's
// busybox-static), the image also has a shell and a few tools, so that commands can run in
// it. It uses no registry, and keeps an existing image of the same files.
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
	files := []file{{name: "bivouac", content: program}}
	if tools, err := toolFiles(); err == nil {
		files = append(files, tools...)
	}
	return demoImage, importImage(ctx, demoImage, files)
}

// toolFiles returns the programs that commands in a container need, as links to this
// machine's busybox. It returns an error if the machine has none that is static.
func toolFiles() ([]file, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	program, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = program.Close() }() // it was only read from
	if libraries, err := program.ImportedLibraries(); err != nil || len(libraries) > 0 {
		return nil, fmt.Errorf("%s is not static", path)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	files := []file{{name: "bin/busybox", content: content}}
	for _, tool := range []string{"sh", "cat", "env", "grep", "kill", "sleep", "stty"} {
		files = append(files, file{name: "bin/" + tool, link: "busybox"})
	}
	return files, nil
}

// AddTools adds the programs that commands in a sandbox need to a folder. It returns an error
// if this machine has no static busybox.
func AddTools(dir string) error {
	files, err := toolFiles()
	if err != nil {
		return fmt.Errorf("stack: add tools: %w", err)
	}
	for _, f := range files {
		path := filepath.Join(dir, filepath.Base(f.name))
		if f.link != "" {
			err = os.Symlink(f.link, path)
		} else {
			err = os.WriteFile(path, f.content, 0o755)
		}
		if err != nil {
			return fmt.Errorf("stack: add tools: %w", err)
		}
	}
	return nil
}

// file is a program in an image, or a symbolic link.
type file struct {
	name    string
	content []byte
	link    string // empty: a program
}

// digestLabel is the label with the digest of the files in an image.
const digestLabel = "bivouac.digest"

// importImage makes an image with that name that runs bivouac, unless it exists.
func importImage(ctx context.Context, name string, files []file) error {
	layer, err := archive(files)
	if err != nil {
		return fmt.Errorf("stack: make %s: %w", name, err)
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(layer))
	// An error most likely means that there is no such image. Others show up below.
	stands, err := docker(ctx, nil, "image", "inspect",
		"--format={{index .Config.Labels "+strconv.Quote(digestLabel)+"}}", name)
	if err == nil && stands == digest {
		return nil
	}
	// An import needs no builder, a plugin that not every docker has.
	if _, err := docker(ctx, bytes.NewReader(layer), "import",
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

// archive returns a tar archive of the files.
func archive(files []file) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		header := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.content)), Linkname: f.link}
		if f.link != "" {
			header.Typeflag = tar.TypeSymlink
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
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
