package pluginhost

import (
	"context"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

// Inspect starts a plugin, asks it who it is, and ends it. The plugins of config
// itself are left alone. The plugin is not configured, so what it says holds whatever its configuration is.
func Inspect(ctx context.Context, config Config, spec Plugin) (runtime.Info, error) {
	info, err := try(ctx, config, spec, (*incarnation).meet)
	if err != nil {
		return runtime.Info{}, fmt.Errorf("plugin %q: %w", spec.Name, err)
	}
	return info, nil
}

// Check starts a plugin, holds its configuration against the schema that it
// declares, and ends it. The plugin is not configured: what it refuses for
// another reason than its schema is not found.
func Check(ctx context.Context, config Config, spec Plugin) error {
	_, err := try(ctx, config, spec, (*incarnation).examine)
	return err
}

// try starts a plugin, calls setUp with its process, and ends it.
func try(ctx context.Context, config Config, spec Plugin, setUp func(*incarnation, context.Context, *plugin) error) (runtime.Info, error) {
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
	inc, err := p.incarnate(ctx, setUp)
	if err != nil {
		return runtime.Info{}, err
	}
	inc.stop()
	return inc.info, nil
}
