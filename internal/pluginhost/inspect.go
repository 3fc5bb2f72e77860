package pluginhost

import (
	"context"

	"github.com/bivouac/bivouac/runtime"
)

// Inspect starts a plugin, asks it who it is, and ends it. The plugins of config
// itself are left alone. The plugin is not configured, so what it says holds whatever its configuration is.
func Inspect(ctx context.Context, config Config, spec Plugin) (runtime.Info, error) {
	l := newLauncher()
	launcherDone := make(chan struct{})
	go func() {
		defer close(launcherDone)
		l.run()
	}()
	defer func() {
		l.close()
		<-launcherDone
	}()
	p, err := newPlugin(config, spec, l, defaultTimings())
	if err != nil {
		return runtime.Info{}, err
	}
	inc, err := p.incarnate(ctx, (*incarnation).meet)
	if err != nil {
		return runtime.Info{}, p.wrap(err)
	}
	inc.stop()
	return inc.info, nil
}
