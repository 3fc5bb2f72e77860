// Package jsonfields reads a JSON object whose values are all strings, more
// strictly than encoding/json's Unmarshal does: that one matches names of other
// case, lets the last of two equal names win, takes null for an empty string
// and puts a replacement in place of what is not Unicode.
//
// It must never know what the fields mean.
package jsonfields

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

var errNotJSON = errors.New("the body is not JSON")

// Parse reads one object that has no fields but those named, each at most once.
// The error's text is for whoever sent the object.
func Parse(text string, names ...string) (map[string]string, error) {
	tokens := json.NewDecoder(strings.NewReader(text))
	if token, err := tokens.Token(); err != nil || token != json.Delim('{') {
		return nil, errors.New("the body is not a JSON object")
	}
	fields := make(map[string]string, len(names))
	for tokens.More() {
		token, err := tokens.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return nil, errNotJSON
		}
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("unknown field %.64q", name)
		}
		if _, ok := fields[name]; ok {
			return nil, fmt.Errorf("duplicate field %s", name)
		}
		if fields[name], err = value(tokens, name); err != nil {
			return nil, err
		}
	}
	if _, err := tokens.Token(); err != nil { // the closing brace
		return nil, errNotJSON
	}
	if _, err := tokens.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("the body goes on after its JSON object")
	}
	return fields, nil
}

func value(tokens *json.Decoder, name string) (string, error) {
	token, err := tokens.Token()
	if err != nil {
		return "", errNotJSON
	}
	s, ok := token.(string)
	if !ok {
		return "", fmt.Errorf("%s is not a string", name)
	}
	if strings.ContainsRune(s, utf8.RuneError) { // the decoder's replacement
		return "", fmt.Errorf("%s is not Unicode text", name)
	}
	return s, nil
}
