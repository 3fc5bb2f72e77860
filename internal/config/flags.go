package config

import (
	"errors"
	"flag"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Flags holds the server's flags from the command line. Load applies them after the files,
// because they override the files.
type Flags struct {
	paths []string
	set   []setting
}

type setting struct{ flag, value string }

// Register adds the flags to a flag set. An invalid value is refused when the command line
// is parsed.
func (f *Flags) Register(set *flag.FlagSet) {
	f.register(set, func(key) bool { return true })
}

// RegisterPlugins adds only the flags that configure plugins.
func (f *Flags) RegisterPlugins(set *flag.FlagSet) {
	f.register(set, func(k key) bool { return k.name == "plugin_dir" })
}

func (f *Flags) register(set *flag.FlagSet, wanted func(key) bool) {
	set.Func("config", "`FILE|DIR` to read, HCL or JSON. May be repeated; later files override earlier ones.", func(path string) error {
		f.paths = append(f.paths, path)
		return nil
	})
	defaults := Default()
	for _, k := range defaults.keys() {
		if !wanted(k) {
			continue
		}
		take := func(value string) error {
			// This only checks the value: defaults is not used.
			if err := setText(k.target, value); err != nil {
				return err
			}
			f.set = append(f.set, setting{k.flag, value})
			return nil
		}
		if _, ok := k.target.(*bool); ok {
			set.BoolFunc(k.flag, k.usage, take)
		} else {
			set.Func(k.flag, described(k), take)
		}
	}
}

// described returns a flag's usage with its default.
func described(k key) string {
	switch target := k.target.(type) {
	case *string:
		if *target == "" {
			return k.usage
		}
		return fmt.Sprintf("%s (default %s)", k.usage, *target)
	case *time.Duration:
		return fmt.Sprintf("%s (default %s)", k.usage, *target)
	case *[]string:
		if len(*target) == 0 {
			return k.usage
		}
		return fmt.Sprintf("%s (default %s)", k.usage, strings.Join(*target, ", "))
	default:
		return k.usage
	}
}

// Load returns the checked configuration from files and flags.
func (f *Flags) Load() (Config, error) {
	c := Default()
	if err := c.Read(f.paths...); err != nil {
		return Config{}, err
	}
	c.apply(f.set)
	if c.Dev && !c.Says("runtime") {
		c.Runtime = "process"
	}
	if err := c.check(); err != nil {
		return Config{}, err
	}
	c.finishPools()
	return c, nil
}

// apply sets the values of the flags. A list in flags replaces the one in files; variables
// of the job template are merged.
func (c *Config) apply(settings []setting) {
	for _, k := range c.keys() {
		for _, s := range settings {
			if s.flag != k.flag {
				continue
			}
			flagName := "-" + k.flag
			if list, ok := k.target.(*[]string); ok && c.origins[k.name] != flagName {
				*list = nil
			}
			_ = setText(k.target, s.value) // already checked in Register
			c.setBy(k.name, flagName)
		}
	}
}

// setText sets a key's target to a flag's value, or adds the value to it.
func setText(target any, text string) error {
	switch target := target.(type) {
	case *string:
		*target = text
	case *bool:
		value, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("must be true or false")
		}
		*target = value
	case *time.Duration:
		value, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q is not a duration such as 90s or 30m", text)
		}
		*target = value
	case *int:
		value, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		*target = value
	case *[]string:
		*target = append(*target, text)
	case *map[string]string:
		name, value, ok := strings.Cut(text, "=")
		if !ok || name == "" {
			return errors.New("must have the form name=value")
		}
		if *target == nil {
			*target = map[string]string{}
		}
		(*target)[name] = value
	}
	return nil
}
