package agent

import (
	"fmt"
	"syscall"
)

const (
	// ownFiles is the number of open files reserved for this process: 160 connections to
	// Consul, 92 to Nomad, one for each of 128 sandboxes whose readiness is being checked,
	// and some for node helpers, plugins and logs.
	ownFiles = 500
	// mostConnections bounds the memory for request bodies, at 64 KiB each.
	mostConnections = 4096
)

// maxConnections returns the maximum number of open connections of callers.
func maxConnections() (int, error) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return 0, fmt.Errorf("agent: read the limit of open files: %w", err)
	}
	return connectionsFor(files.Cur), nil
}

// connectionsFor reserves ownFiles of the files for this process, or half of the files if
// there are less than twice as many.
func connectionsFor(files uint64) int {
	return int(min(mostConnections, files-min(ownFiles, files/2)))
}
