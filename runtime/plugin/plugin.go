package plugin

import (
	"fmt"
	"os"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/pluginwire"
	"github.com/bivouac/bivouac/runtime"
)

// DropMarksKey is the variable by which a plugin's process is told
// [runtime.Config].DropMarks: "1" if so.
const DropMarksKey = pluginwire.DropMarksKey

// Serve serves driver to the host that started this process, and returns when
// the host has told it to end. It is the last thing in a plugin's main. Where
// the process was not started by a host, it says so and ends it with code 1.
func Serve(driver runtime.Driver) {
	if os.Getenv(pluginwire.CookieKey) != pluginwire.CookieValue {
		fmt.Fprintln(os.Stderr, "This is a runtime plugin of Bivouac, which starts it by itself. To try it:\n"+
			"  bivouac plugin run PATH\n  bivouac plugin verify PATH")
		// go-plugin adds to that, and ends the process.
	}
	pluginwire.Serve(driver, NewLogger().Named("go-plugin"))
}

// NewLogger returns a logger whose lines come out of the host's own log, with
// their level and values. The host's log level decides what is shown.
func NewLogger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Level:      hclog.Trace,
		Output:     os.Stderr,
		JSONFormat: true,
	})
}
