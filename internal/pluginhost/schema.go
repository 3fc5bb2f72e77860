package pluginhost

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/pb33f/jsonschema/v6"

	"github.com/bivouac/bivouac/runtime"
)

// checkConfig holds a plugin's configuration against the schema that the plugin
// declares.
func checkConfig(info runtime.Info, config json.RawMessage) error {
	if len(info.ConfigSchema) == 0 || !slices.Contains(info.Abilities, runtime.AbilityConfigure) {
		if string(config) != emptyConfig {
			return errors.New("configuration: the plugin takes none")
		}
		return nil
	}
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(info.ConfigSchema))
	if err != nil {
		return fmt.Errorf("configuration schema: %w", err)
	}
	const name = "plugin:///config.json"
	compiler := jsonschema.NewCompiler()
	compiler.UseLoader(noOtherDocuments{})
	if err := compiler.AddResource(name, document); err != nil {
		return fmt.Errorf("configuration schema: %w", err)
	}
	schema, err := compiler.Compile(name)
	if err != nil {
		return fmt.Errorf("configuration schema: %w", err)
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(config))
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if err := schema.Validate(value); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	return nil
}

// noOtherDocuments keeps a schema from reading files and URLs.
type noOtherDocuments struct{}

func (noOtherDocuments) Load(url string) (any, error) {
	return nil, fmt.Errorf("the schema refers to %s, and may not refer to other documents", url)
}
