// Command plugin-docker is a runtime plugin of Bivouac: each sandbox is a
// container of a Docker engine.
package main

import (
	"github.com/bivouac/bivouac/runtime/plugin"
)

func main() {
	plugin.Serve(&driver{logger: plugin.NewLogger()})
}
