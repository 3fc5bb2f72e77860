// Command plugin-docker is a runtime plugin for Bivouac. Each sandbox is a container of a
// Docker engine.
package main

import (
	"os"

	"github.com/bivouac/bivouac/runtime/plugin"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == guardArg {
		runGuard(os.Args[2])
		return
	}
	plugin.Serve(&driver{logger: plugin.NewLogger()})
}
