package pluginhost

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	goplugin "github.com/hashicorp/go-plugin"

	"github.com/bivouac/bivouac/runtime"
)

// Check returns what is wrong with a plugin's settings, without looking at its file.
// dir is the plugin folder, or empty if there is none.
func (p Plugin) Check(dir string) error {
	if !runtime.ValidName(p.Name) {
		return errors.New("its name is not 1 to 64 of a-z, 0-9 and '-', or begins with '-'")
	}
	if p.Path == "" && dir == "" {
		return errors.New("it has no path, and there is no plugin_dir to find it in")
	}
	if p.SHA256 != "" {
		if sum, err := hex.DecodeString(p.SHA256); err != nil || len(sum) != sha256.Size {
			return fmt.Errorf("sha256 %q is not %d hex digits", p.SHA256, 2*sha256.Size)
		}
	}
	for name, value := range p.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return fmt.Errorf("%q cannot be a variable of its environment", name)
		}
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(p.Config, &object); len(p.Config) > 0 && err != nil {
		return fmt.Errorf("its configuration is not a JSON object: %w", err)
	}
	return nil
}

// file returns the absolute path of the plugin's file.
func (p Plugin) file(dir string) (string, error) {
	return filepath.Abs(cmp.Or(p.Path, filepath.Join(dir, p.Name)))
}

// verify checks a plugin's file before it is run: its type, its mode and, if sum is not
// empty, its checksum.
func verify(path, sum string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a file", path)
	case info.Mode()&0o111 == 0:
		return fmt.Errorf("%s is not executable", path)
	case sum == "":
		return nil
	}
	want, err := hex.DecodeString(sum)
	if err != nil {
		return err
	}
	// A SecureConfig works for one check only, so each start needs its own.
	secure := goplugin.SecureConfig{Checksum: want, Hash: sha256.New()}
	ok, err := secure.Check(path)
	switch {
	case err != nil:
		return fmt.Errorf("verify the checksum: %w", err)
	case !ok:
		return fmt.Errorf("the checksum of %s is not the configured sha256 %s", path, sum)
	}
	return nil
}
