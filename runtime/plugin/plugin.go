package plugin

import (
	"fmt"
	"os"

	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/pluginwire"
	"github.com/bivouac/bivouac/runtime"
)

// DropMarksKey is the environment variable that is "1" if [runtime.Config].DropMarks is
// set.
const DropMarksKey = pluginwire.DropMarksKey

// Serve serves driver to the host that started this process, and returns after the
// host has asked it to end. Call it last in a plugin's main. If no host started the
// process, Serve prints how to use it and exits with code 1.
func Serve(driver runtime.Driver) {
	if os.Getenv(pluginwire.CookieKey) != pluginwire.CookieValue {
		fmt.Fprintln(os.Stderr, "This is a runtime plugin of Bivouac, which starts it by itself. To try it:\n"+
			"  bivouac plugin run PATH\n  bivouac plugin verify PATH")
		// goplugin.Serve prints more and exits.
	}
	pluginwire.Serve(driver, NewLogger().Named("go-plugin"))
}

// NewLogger returns a logger whose lines appear in the host's log, with their level and
// values. The host's log level decides which are shown.
func NewLogger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Level:      hclog.Trace,
		Output:     os.Stderr,
		JSONFormat: true,
	})
}
