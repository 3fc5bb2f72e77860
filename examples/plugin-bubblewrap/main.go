// Command plugin-bubblewrap is a runtime plugin for Bivouac. Each sandbox is a process of
// this machine without privileges, which bubblewrap isolates with kernel namespaces. The
// plugin needs Linux and the program bwrap (Debian package bubblewrap).
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
