// Command plugin-bubblewrap is a runtime plugin of Bivouac: each sandbox is a
// process of this machine, isolated by bubblewrap with the kernel's namespaces
// and without privileges. It needs Linux and the program bwrap, which Debian
// has in its package bubblewrap.
package main

import (
	"os"

	"github.com/bivouac/bivouac/runtime/plugin"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == initArg {
		os.Exit(runInit(os.Args[2:])) // inside a sandbox
	}
	plugin.Serve(&driver{logger: plugin.NewLogger()})
}
