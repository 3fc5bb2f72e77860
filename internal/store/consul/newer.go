package consul

import (
	"encoding/json"
	"fmt"
	"strings"
)

// newerPart is the part of a record that a newer version wrote and this version does
// not know. It belongs to one session. If there is no such part, it is nil.
type newerPart struct {
	version   int    // the record's version; counts if above recordVersion
	minReader int    // the record's min_reader; counts if above minReader
	fields    object // a nested object has only its unknown fields
}

// object is a JSON object whose fields are not decoded.
type object map[string]json.RawMessage

// newerPartOf returns the part of a stored record that [record] lacks.
func newerPartOf(value []byte) (*newerPart, error) {
	var known record
	var whole object
	if err := json.Unmarshal(value, &known); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(value, &whole); err != nil {
		return nil, err
	}
	part := &newerPart{version: known.Version, minReader: known.MinReader}
	text, err := json.Marshal(known)
	if err == nil {
		part.fields, err = whole.without(asObject(text))
	}
	return part, err
}

// addTo returns r as JSON, with the part that a newer version wrote.
func (p *newerPart) addTo(r record) ([]byte, error) {
	if p == nil {
		return json.Marshal(r)
	}
	r.Version, r.MinReader = max(r.Version, p.version), max(r.MinReader, p.minReader)
	text, err := json.Marshal(r)
	if err != nil || len(p.fields) == 0 {
		return text, err
	}
	whole := asObject(text)
	if err := whole.add(p.fields); err != nil {
		return nil, err
	}
	return json.Marshal(whole)
}

// asObject returns nil if text is not a JSON object.
func asObject(text []byte) object {
	var o object
	if json.Unmarshal(text, &o) != nil {
		return nil
	}
	return o
}

// without returns the fields of o that known lacks, including nested ones. A name that
// differs from a known name only in case is not unknown, because encoding/json treats
// them as the same.
func (o object) without(known object) (object, error) {
	rest := make(object)
	for name, value := range o {
		same, ok := known[name]
		if !ok {
			if !known.hasFolded(name) {
				rest[name] = value
			}
			continue
		}
		inner, err := asObject(value).without(asObject(same))
		if err == nil && len(inner) > 0 {
			rest[name], err = json.Marshal(inner)
		}
		if err != nil {
			return nil, fmt.Errorf("field %s: %w", name, err)
		}
	}
	return rest, nil
}

func (o object) hasFolded(name string) bool {
	for known := range o {
		if strings.EqualFold(known, name) {
			return true
		}
	}
	return false
}

// add adds the fields of rest to o, including nested ones.
func (o object) add(rest object) error {
	for name, value := range rest {
		known, ok := o[name]
		if !ok {
			o[name] = value
			continue
		}
		inner := asObject(known)
		if inner == nil {
			continue // the nested object is gone, so drop its unknown fields too
		}
		if err := inner.add(asObject(value)); err != nil {
			return err
		}
		var err error
		if o[name], err = json.Marshal(inner); err != nil {
			return fmt.Errorf("field %s: %w", name, err)
		}
	}
	return nil
}
