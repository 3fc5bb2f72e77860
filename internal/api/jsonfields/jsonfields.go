// Package jsonfields reads a JSON object of strings, and of objects and lists of strings, more
// strictly than encoding/json's Unmarshal does: that one matches names of other
// case, lets the last of two equal names win, and puts a replacement in place of what is not Unicode.
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

// Parse reads one object that has no fields but those named, each at most once. The
// fields in names are strings. Those in objectNames are objects of strings, whose
// fields may have any names. A field that is null counts as absent. The error's text
// is for the sender of the object.
func Parse(text string, names, objectNames []string) (fields map[string]string, objects map[string]map[string]string, err error) {
	fields, objects, _, err = ParseLists(text, names, objectNames, nil)
	return fields, objects, err
}

// ParseLists works as Parse does, and also reads the fields in listNames, which are lists of
// strings.
func ParseLists(text string, names, objectNames, listNames []string) (
	fields map[string]string, objects map[string]map[string]string, lists map[string][]string, err error,
) {
	tokens := json.NewDecoder(strings.NewReader(text))
	if token, err := tokens.Token(); err != nil || token != json.Delim('{') {
		return nil, nil, nil, errors.New("the body is not a JSON object")
	}
	fields, objects, lists = make(map[string]string), make(map[string]map[string]string), make(map[string][]string)
	err = eachField(tokens, "", func(name string, value json.Token) (err error) {
		switch {
		case slices.Contains(names, name):
			if value != nil {
				fields[name], err = unicodeText(name, value)
			}
		case slices.Contains(objectNames, name):
			if value != nil {
				objects[name], err = object(tokens, name, value)
			}
		case slices.Contains(listNames, name):
			if value != nil {
				lists[name], err = list(tokens, name, value)
			}
		default:
			return fmt.Errorf("unknown field %.64q", name)
		}
		return err
	})
	if err != nil {
		return nil, nil, nil, err
	}
	if _, err := tokens.Token(); !errors.Is(err, io.EOF) {
		return nil, nil, nil, errors.New("the body goes on after its JSON object")
	}
	return fields, objects, lists, nil
}

// eachField calls read with the name and the first token of each field of an
// object, whose opening brace has been read, up to its closing brace. In errors
// the names stand after prefix.
func eachField(tokens *json.Decoder, prefix string, read func(name string, value json.Token) error) error {
	seen := make(map[string]bool)
	for tokens.More() {
		token, err := tokens.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return errNotJSON
		}
		if seen[name] {
			return fmt.Errorf("duplicate field %s%.64s", prefix, name)
		}
		seen[name] = true
		value, err := tokens.Token()
		if err != nil {
			return errNotJSON
		}
		if err := read(name, value); err != nil {
			return err
		}
	}
	if _, err := tokens.Token(); err != nil { // the closing brace
		return errNotJSON
	}
	return nil
}

// object reads an object of strings, of which first is the first token.
func object(tokens *json.Decoder, name string, first json.Token) (map[string]string, error) {
	if first != json.Delim('{') {
		return nil, fmt.Errorf("%s is not an object", name)
	}
	values := make(map[string]string)
	err := eachField(tokens, name+".", func(inner string, value json.Token) (err error) {
		if strings.ContainsRune(inner, utf8.RuneError) {
			return fmt.Errorf("%s has a name that is not Unicode text", name)
		}
		values[inner], err = unicodeText(fmt.Sprintf("%s.%.64s", name, inner), value)
		return err
	})
	return values, err
}

// list reads a list of strings, of which first is the first token.
func list(tokens *json.Decoder, name string, first json.Token) ([]string, error) {
	if first != json.Delim('[') {
		return nil, fmt.Errorf("%s is not a list", name)
	}
	values := []string{}
	for tokens.More() {
		token, err := tokens.Token()
		if err != nil {
			return nil, errNotJSON
		}
		value, err := unicodeText(fmt.Sprintf("%s.%d", name, len(values)), token)
		if err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	if _, err := tokens.Token(); err != nil { // the closing bracket
		return nil, errNotJSON
	}
	return values, nil
}

func unicodeText(name string, value json.Token) (string, error) {
	s, ok := value.(string)
	if !ok {
		return "", fmt.Errorf("%s is not a string", name)
	}
	if strings.ContainsRune(s, utf8.RuneError) { // the decoder's replacement
		return "", fmt.Errorf("%s is not Unicode text", name)
	}
	return s, nil
}
