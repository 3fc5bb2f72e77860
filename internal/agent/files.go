package agent

import (
	"fmt"
	"syscall"
)

const (
	// ownFiles is how many open files are kept for this process itself: 160
	// connections to Consul, 33 to Nomad, one for each of 128 sandboxes that are
	// asked whether they are ready, and some for plugins and the log.
	ownFiles = 400
	// mostConnections bounds what the bodies of requests may take, at 64 KiB each.
	mostConnections = 4096
)

// maxConnections returns how many connections of callers may be open at a time.
func maxConnections() (int, error) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return 0, fmt.Errorf("agent: read the limit of open files: %w", err)
	}
	return connectionsFor(files.Cur), nil
}

// connectionsFor leaves ownFiles of the files to this process, or half of them
// if they are fewer than twice as many.
func connectionsFor(files uint64) int {
	return int(min(mostConnections, files-min(ownFiles, files/2)))
}
