package pluginhost

import (
	"context"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

// Inspect starts a plugin, reads its info, and ends it. It does not configure the
// plugin and does not start the plugins of config.
func Inspect(ctx context.Context, config Config, spec Plugin) (runtime.Info, error) {
	info, err := try(ctx, config, spec, (*instance).meet)
	if err != nil {
		return runtime.Info{}, fmt.Errorf("plugin %q: %w", spec.Name, err)
	}
	return info, nil
}

// checkInstance is the instance ID that Check gives to a plugin, so that the plugin
// does not touch anything of a running instance.
const checkInstance = "config-validate"

// Check starts a plugin, configures it for the instance "config-validate", and
// ends it. It returns what the plugin says about itself.
func Check(ctx context.Context, config Config, spec Plugin) (runtime.Info, error) {
	config.Instance = checkInstance
	return try(ctx, config, spec, (*instance).setUp)
}

// try starts a plugin, calls setUp with its process, and ends the process.
func try(ctx context.Context, config Config, spec Plugin, setUp func(*instance, context.Context, *plugin) error) (runtime.Info, error) {
	l := newLauncher()
	l.run()
	defer l.close()
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
