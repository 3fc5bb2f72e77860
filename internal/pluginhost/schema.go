package pluginhost

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/pb33f/jsonschema/v6"

	"github.com/bivouac/bivouac/runtime"
)

// checkConfig holds the plugin's configuration against the schema that the
// plugin declares. A schema may be made so that to check anything against it
// takes for ever, so that is given timings.check. What cannot be interrupted
// then goes on beside the host; until it has ended the plugin is refused, so
// that there is never more than one such check of a plugin.
func (p *plugin) checkConfig(ctx context.Context, info runtime.Info) error {
	select {
	case p.checking <- struct{}{}:
	default:
		return errors.New("configuration schema: an earlier check against it has not come to an end")
	}
	limited, cancel := context.WithTimeout(ctx, p.timings.check)
	defer cancel()
	checked := make(chan error, 1)
	go func() {
		defer func() { <-p.checking }()
		checked <- checkConfig(limited, info, p.spec.Config)
	}()
	var err error
	select {
	case err = <-checked:
	case <-limited.Done():
		err = limited.Err()
	}
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("configuration schema: the check against it took longer than %s", p.timings.check)
	}
	return err
}

// checkConfig holds a configuration against the schema in info.
func checkConfig(ctx context.Context, info runtime.Info, config json.RawMessage) (err error) {
	if len(info.ConfigSchema) == 0 || !slices.Contains(info.Abilities, runtime.AbilityConfigure) {
		if string(config) != emptyConfig {
			return errors.New("configuration: the plugin takes none")
		}
		return nil
	}
	// The library does not take all that a schema may hold: a number with an
	// exponent of eight digits makes it panic.
	defer func() {
		switch caught := recover().(type) {
		case nil:
		case interrupted:
			err = caught.error
		default:
			err = fmt.Errorf("configuration schema: it cannot be checked against: %v", caught)
		}
	}()
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(info.ConfigSchema))
	if err != nil {
		return fmt.Errorf("configuration schema: %w", err)
	}
	const name = "plugin:///config.json"
	compiler := jsonschema.NewCompiler()
	compiler.UseLoader(noOtherDocuments{})
	compiler.RegisterVocabulary(interruptions(ctx))
	compiler.AssertVocabs()
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

// interruptions is a vocabulary without keywords. The library knows no context,
// but calls a vocabulary for each schema that it comes to: a panic is the way
// out from there.
func interruptions(ctx context.Context) *jsonschema.Vocabulary {
	return &jsonschema.Vocabulary{
		URL: "plugin:///interruptions",
		Compile: func(*jsonschema.CompilerContext, map[string]any) (jsonschema.SchemaExt, error) {
			look := lookout{ctx}
			look.Validate(nil, nil)
			return look, nil
		},
	}
}

// interrupted is what a check panics with whose context ended.
type interrupted struct{ error }

type lookout struct{ ctx context.Context }

func (l lookout) Validate(*jsonschema.ValidatorContext, any) {
	if err := l.ctx.Err(); err != nil {
		panic(interrupted{err})
	}
}

// noOtherDocuments keeps a schema from reading files and URLs.
type noOtherDocuments struct{}

func (noOtherDocuments) Load(url string) (any, error) {
	return nil, fmt.Errorf("the schema refers to %s, and may not refer to other documents", url)
}
