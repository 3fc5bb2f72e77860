// Command plugin-docker is a runtime plugin for Bivouac. Each sandbox is a container of a
// Docker engine.
package main

import (
	"github.com/bivouac/bivouac/runtime/plugin"
)

func main() {
	plugin.Serve(&driver{logger: plugin.NewLogger()})
}
