package pluginhost

import (
	"context"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

// Inspect starts a plugin, asks it who it is, and ends it. It does not configure
// the plugin, nor start the plugins of config.
func Inspect(ctx context.Context, config Config, spec Plugin) (runtime.Info, error) {
	info, err := try(ctx, config, spec, (*instance).meet)
	if err != nil {
		return runtime.Info{}, fmt.Errorf("plugin %q: %w", spec.Name, err)
	}
	return info, nil
}

// checkInstance is what a plugin is told as its instance when only its
// configuration is checked, so that it touches nothing of an instance that runs.
const checkInstance = "config-validate"

// Check starts a plugin, configures it for the instance "config-validate", and
// ends it.
func Check(ctx context.Context, config Config, spec Plugin) error {
	config.Instance = checkInstance
	_, err := try(ctx, config, spec, (*instance).setUp)
	return err
}

// try starts a plugin, calls setUp with its process, and ends it.
func try(ctx context.Context, config Config, spec Plugin, setUp func(*instance, context.Context, *plugin) error) (runtime.Info, error) {
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
	inc, err := p.startInstance(ctx, setUp)
	if err != nil {
		return runtime.Info{}, err
	}
	inc.stop()
	return inc.info, nil
}
