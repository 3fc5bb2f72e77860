// Package node is the node helper: it gives a sandbox that already runs the volume of a
// chat. It is a small process of root on each Nomad client that has sandboxes.
//
// [Run] serves two orders and one question over HTTPS, and callers need a client
// certificate. Look finds a sandbox by what Nomad and Docker control, the container's label
// or the cgroup, and keeps a handle of its process that the reuse of a process ID cannot
// mislead. Bind writes down which chat gets the sandbox, clones the mount of the volume,
// enters the mount namespace of the sandbox, and moves the clone there. Then it mounts a
// small read-only file system with the session file. For raw_exec, which has no namespace,
// it makes a symbolic link instead. Bound tells what is written down, so that a chat's
// sandbox can be found after its record was lost.
//
// What is written down decides who has a sandbox: it is outside of the sandbox, and made in
// one step. So a second order for another chat is a conflict, and the same order again
// finishes what a killed helper began.
//
// The helper mounts nothing on the node itself, and takes no other orders. It does not know
// Nomad, Consul, or which sandbox is a spare.
package node

import (
	"errors"
	"fmt"
	"path"

	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/runtime"
)

// Config is the configuration of a helper.
type Config struct {
	HTTPAddr string // where to listen, HOST:PORT

	// TLS has the helper's certificate, and the CAs of the certificates of those who may
	// give orders. All three files are required.
	TLS credentials.Files
	// ClientName is the DNS name that their certificates must have.
	ClientName string

	// VolumeRoots are the folders that may have volumes, at any depth below. At least one is
	// required.
	VolumeRoots []string

	LogLevel string // trace, debug, info, warn or error
	LogJSON  bool
}

// Validate returns what is wrong with the configuration. It does not read the files.
func (c Config) Validate() error {
	var errs []error
	if c.HTTPAddr == "" {
		errs = append(errs, errors.New("-http-addr is missing"))
	}
	if c.TLS.CA == "" {
		errs = append(errs, errors.New("-tls-client-ca-file is missing"))
	}
	if c.TLS.Certificate == "" {
		errs = append(errs, errors.New("-tls-cert-file is missing"))
	}
	if c.TLS.Key == "" {
		errs = append(errs, errors.New("-tls-key-file is missing"))
	}
	if c.ClientName == "" {
		errs = append(errs, errors.New("-tls-client-name is empty"))
	}
	if len(c.VolumeRoots) == 0 {
		errs = append(errs, errors.New("-volume-root is missing: pass it once for each folder with volumes"))
	}
	for _, root := range c.VolumeRoots {
		if err := runtime.ValidateVolumeHostPath(root); err != nil {
			errs = append(errs, fmt.Errorf("-volume-root %q %w", root, err))
		} else if path.Dir(root) == root {
			errs = append(errs, errors.New("-volume-root must not be /"))
		}
	}
	return errors.Join(errs...)
}
