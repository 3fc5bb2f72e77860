package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/lockedfile"
	"golang.org/x/mod/modfile"
	"golang.org/x/mod/semver"
)

// NomadBinary returns the path of a Nomad of the pinned minor version: the one on PATH if it
// fits, and otherwise one built from the pin. The first build on a machine takes minutes and
// downloads modules.
func NomadBinary(ctx context.Context) (string, error) { return binary(ctx, "nomad") }

// ConsulBinary is like [NomadBinary], for Consul.
func ConsulBinary(ctx context.Context) (string, error) { return binary(ctx, "consul") }

func binary(ctx context.Context, name string) (string, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", fmt.Errorf("stack: find %s: %w", name, err)
	}
	dir := filepath.Join(root, "internal", "test", "stack", name)
	pkg := "github.com/hashicorp/" + name
	version, err := pinned(filepath.Join(dir, "go.mod"), pkg)
	if err != nil {
		return "", fmt.Errorf("stack: find %s: %w", name, err)
	}
	if path, err := exec.LookPath(name); err == nil && fits(ctx, path, version) {
		return path, nil
	}
	path, err := cached(name+"-"+strings.TrimPrefix(version, "v"), func(out string) error {
		return goBuild(ctx, dir, pkg, out, nil)
	})
	if err != nil {
		return "", fmt.Errorf("stack: build %s %s: %w", name, version, err)
	}
	return path, nil
}

// moduleRoot returns the directory of the main module's go.mod.
func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if mod == "" || mod == os.DevNull {
		return "", errors.New("not inside Bivouac's source tree")
	}
	return filepath.Dir(mod), nil
}

// pinned returns the version of a module that a go.mod requires.
func pinned(gomod, path string) (string, error) {
	data, err := os.ReadFile(gomod)
	if err != nil {
		return "", err
	}
	file, err := modfile.Parse(gomod, data, nil)
	if err != nil {
		return "", err
	}
	for _, r := range file.Require {
		if r.Mod.Path == path {
			return r.Mod.Version, nil
		}
	}
	return "", fmt.Errorf("%s does not require %s", gomod, path)
}

// fits reports whether the program at path has the same minor version. A program that does
// not print its version does not fit.
func fits(ctx context.Context, path, version string) bool {
	out, err := exec.CommandContext(ctx, path, "version").Output()
	if err != nil {
		return false
	}
	fields := strings.Fields(string(out)) // "Nomad v1.11.3", then other lines
	return len(fields) > 1 && semver.MajorMinor(fields[1]) == semver.MajorMinor(version)
}

// cached returns the path of a file in the user's cache, and makes the file if it does not
// exist. If several processes need the same file, one makes it and the others wait.
func cached(name string, build func(out string) error) (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, "bivouac", "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	unlock, err := lockedfile.MutexAt(path + ".lock").Lock()
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return path, err
	}
	// Rename it only when it is complete, so that an interrupted build is not taken for a
	// program.
	part := path + ".part"
	if err := build(part); err != nil {
		return "", err
	}
	return path, os.Rename(part, path)
}

// goBuild builds a package of the module in dir.
func goBuild(ctx context.Context, dir, pkg, out string, tags []string, env ...string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-tags="+strings.Join(tags, ","), "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	cmd.Env = append(cmd.Env, env...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, msg)
	}
	return nil
}
