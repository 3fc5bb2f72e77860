// Package version says which Bivouac this is, as the Go toolchain recorded it
// when the binary was built. It must never need to be told by hand.
package version

import (
	"runtime"
	"runtime/debug"
)

// Info identifies a build.
type Info struct {
	Version   string `json:"version"`            // of the module: a tag, a pseudo-version, or "(devel)"
	Revision  string `json:"revision,omitempty"` // the commit, where built from a checkout
	Modified  bool   `json:"modified"`           // the checkout had changes of its own
	GoVersion string `json:"go_version"`
}

// Get returns what is known of the running binary.
func Get() Info {
	info := Info{Version: "(devel)", GoVersion: runtime.Version()}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return info
	}
	if build.Main.Version != "" {
		info.Version = build.Main.Version
	}
	for _, setting := range build.Settings {
		switch setting.Key {
		case "vcs.revision":
			info.Revision = setting.Value
		case "vcs.modified":
			info.Modified = setting.Value == "true"
		}
	}
	return info
}

// String is Info in one line, for people.
func (i Info) String() string {
	s := "Bivouac " + i.Version
	if i.Revision != "" {
		s += " (" + i.Revision
		if i.Modified {
			s += ", modified"
		}
		s += ")"
	}
	return s + " " + i.GoVersion
}
