package apitest

import (
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/pb33f/libopenapi/datamodel/high/base"
	"github.com/pb33f/libopenapi/datamodel/high/v3"
)

// CheckDocument fails the test if openapi.json is not valid OpenAPI 3.1 or
// breaks a rule of this API:
//
//   - each operation has a unique ID, a summary, a description and a tag
//     that the document describes;
//   - each parameter has a description;
//   - each example fits its schema;
//   - properties are in snake_case, except in schemas with x-nomad;
//   - each component is referred to.
func (r *Recorder) CheckDocument() {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	_, errs := r.validator.ValidateDocument()
	problems := append(texts(errs), r.checkOperations()...)
	var document any
	if err := json.Unmarshal(r.openAPI, &document); err != nil {
		problems = append(problems, err.Error())
	}
	for _, problem := range append(problems, checkNames(document)...) {
		r.t.Errorf("openapi.json: %s", problem)
	}
}

func (r *Recorder) checkOperations() []string {
	var problems []string
	tags, ids := map[string]bool{}, map[string]bool{"": true}
	for _, tag := range r.model.Tags {
		tags[tag.Name] = true
	}
	for name, operation := range r.operations() {
		if ids[operation.OperationId] {
			problems = append(problems, fmt.Sprintf("%s has no operationId of its own: %q", name, operation.OperationId))
		}
		ids[operation.OperationId] = true
		if operation.Summary == "" || operation.Description == "" {
			problems = append(problems, name+" has no summary or no description")
		}
		if len(operation.Tags) == 0 || !tags[operation.Tags[0]] {
			problems = append(problems, fmt.Sprintf("%s has no tag that the document describes: %q", name, operation.Tags))
		}
		for _, parameter := range operation.Parameters {
			if parameter.Description == "" {
				problems = append(problems, fmt.Sprintf("%s: parameter %s has no description", name, parameter.Name))
			}
			if parameter.Example != nil {
				problems = append(problems, r.checkExample(name+": parameter "+parameter.Name, parameter.Schema, parameter.Example)...)
			}
		}
		for place, media := range bodies(operation) {
			if media.Example != nil {
				problems = append(problems, r.checkExample(name+": "+place, media.Schema, media.Example)...)
			}
			for _, example := range media.Examples.FromOldest() {
				problems = append(problems, r.checkExample(name+": "+place, media.Schema, example.Value)...)
			}
		}
	}
	return problems
}

// operations returns each operation by its method and path.
func (r *Recorder) operations() iter.Seq2[string, *v3.Operation] {
	return func(yield func(string, *v3.Operation) bool) {
		for path, item := range r.model.Paths.PathItems.FromOldest() {
			for method, operation := range item.GetOperations().FromOldest() {
				if !yield(strings.ToUpper(method)+" "+path, operation) {
					return
				}
			}
		}
	}
}

// bodies returns the request and response bodies of an operation.
func bodies(operation *v3.Operation) iter.Seq2[string, *v3.MediaType] {
	return func(yield func(string, *v3.MediaType) bool) {
		if operation.RequestBody != nil {
			for _, media := range operation.RequestBody.Content.FromOldest() {
				if !yield("request", media) {
					return
				}
			}
		}
		for status, response := range operation.Responses.Codes.FromOldest() {
			for _, media := range response.Content.FromOldest() {
				if !yield(status, media) {
					return
				}
			}
		}
	}
}

func (r *Recorder) checkExample(place string, schema *base.SchemaProxy, example interface{ Decode(any) error }) []string {
	var value any
	if err := example.Decode(&value); err != nil {
		return []string{place + ": " + err.Error()}
	}
	text, err := json.Marshal(value)
	if err != nil {
		return []string{place + ": " + err.Error()}
	}
	var problems []string
	_, errs := r.errors.ValidateSchemaBytes(schema.Schema(), text)
	for _, problem := range texts(errs) {
		problems = append(problems, place+": its example: "+problem)
	}
	return problems
}

var snakeCase = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)

// checkNames checks the names of properties and finds unused components.
func checkNames(document any) []string {
	var problems []string
	used := map[string]bool{}
	walk(document, func(object map[string]any) {
		if reference, ok := object["$ref"].(string); ok {
			used[reference] = true
		}
		properties, _ := object["properties"].(map[string]any)
		if _, ok := object["x-nomad"]; ok {
			return
		}
		for name := range properties {
			if !snakeCase.MatchString(name) {
				problems = append(problems, fmt.Sprintf("property %q is not in snake_case", name))
			}
		}
	})
	root, _ := document.(map[string]any)
	components, _ := root["components"].(map[string]any)
	for kind, all := range components {
		if kind == "securitySchemes" {
			continue // the document refers to them by name
		}
		of, _ := all.(map[string]any)
		for name := range of {
			if reference := "#/components/" + kind + "/" + name; !used[reference] {
				problems = append(problems, reference+" is not referred to")
			}
		}
	}
	slices.Sort(problems)
	return problems
}

// walk calls visit with each object of a JSON document.
func walk(node any, visit func(map[string]any)) {
	switch node := node.(type) {
	case map[string]any:
		visit(node)
		for _, key := range slices.Sorted(maps.Keys(node)) {
			walk(node[key], visit)
		}
	case []any:
		for _, item := range node {
			walk(item, visit)
		}
	}
}
