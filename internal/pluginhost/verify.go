package pluginhost

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	goplugin "github.com/hashicorp/go-plugin"
)

var pluginName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// check returns what in a plugin's configuration cannot be right, whatever its
// file is.
func (s Plugin) check() error {
	if !pluginName.MatchString(s.Name) {
		return errors.New("its name is not 1 to 64 of a-z, 0-9 and '-'")
	}
	if s.SHA256 != "" {
		if sum, err := hex.DecodeString(s.SHA256); err != nil || len(sum) != sha256.Size {
			return fmt.Errorf("sha256 %q is not %d hex digits", s.SHA256, 2*sha256.Size)
		}
	}
	for name, value := range s.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return fmt.Errorf("%q cannot be a variable of its environment", name)
		}
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(s.Config, &object); err != nil {
		return fmt.Errorf("its configuration is not a JSON object: %w", err)
	}
	return nil
}

// file returns the plugin's file.
func (s Plugin) file(dir string) (string, error) {
	path := s.Path
	if path == "" {
		if dir == "" {
			return "", errors.New("no plugin folder is configured")
		}
		path = filepath.Join(dir, s.Name)
	}
	return filepath.Abs(path)
}

// verify looks at a plugin's file before it is run.
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
	// A SecureConfig is good for one check only, so each start has its own.
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
