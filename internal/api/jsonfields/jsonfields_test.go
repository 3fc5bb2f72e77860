package jsonfields_test

import (
	"encoding/json"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api/jsonfields"
)

func TestObjectsThatAreRead(t *testing.T) {
	for text, want := range map[string]map[string]string{
		`{}`:                              {},
		` { "a" : "1" , "b":"" } ` + "\n": {"a": "1", "b": ""},
		`{"a":"\"\u00e4\ud83d\ude00"}`:    {"a": `"ä😀`},
		`{"\u0061":"1"}`:                  {"a": "1"},
	} {
		fields, err := jsonfields.Parse(text, "a", "b")
		must.NoError(t, err)
		must.Eq(t, want, fields)
	}
}

func TestTextThatIsRefused(t *testing.T) {
	cases := []struct{ when, text, says string }{
		{"nothing", "", "not a JSON object"},
		{"white space", "  ", "not a JSON object"},
		{"no JSON", `a=b`, "not a JSON object"},
		{"an array", `[]`, "not a JSON object"},
		{"null", `null`, "not a JSON object"},
		{"a byte order mark", "\ufeff{}", "not a JSON object"},
		{"half an object", `{"a":"1"`, "not JSON"},
		{"a comma too many", `{"a":"1",}`, "not JSON"},
		{"a comma too few", `{"a":"1" "b":"2"}`, "not JSON"},
		{"a name without a value", `{"a"}`, "not JSON"},
		{"a name that is a number", `{1:"1"}`, "not JSON"},
		{"the wrong bracket", `{"a":"1"]`, "not JSON"},
		{"an unknown name", `{"a":"1","c":"x"}`, `unknown field "c"`},
		{"a name in another case", `{"A":"1"}`, `unknown field "A"`},
		{"a name that stands twice", `{"a":"1","a":"2"}`, "duplicate field a"},
		{"a number", `{"a":1}`, "a is not a string"},
		{"null for a string", `{"a":null}`, "a is not a string"},
		{"an object for a string", `{"a":{}}`, "a is not a string"},
		{"half a surrogate pair", `{"a":"\ud800"}`, "a is not Unicode"},
		{"bytes that are not UTF-8", "{\"a\":\"1\xff\"}", "a is not Unicode"},
		{"two objects", `{}{}`, "goes on"},
		{"something after the object", `{} ]`, "goes on"},
	}
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			_, err := jsonfields.Parse(c.text, "a", "b")
			must.ErrorContains(t, err, c.says)
		})
	}
}

// FuzzParse holds the parser against encoding/json: what it accepts is JSON,
// and means the same to both.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		`{"a":"1","b":"2"}`, `{}`, `null`, `{"a":"1","a":"2"}`, `{"b":"30m"} `, `{"a":"\ud800"}`,
		`{"a":"\u0000"}`, `{"a" "1"}`, `{"a":"1"}{}`, `{,}`, `{"a":"1",}`, "\ufeff{}", `{"\u0061":"\/"}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		fields, err := jsonfields.Parse(text, "a", "b")
		if err != nil {
			must.NotEq(t, "", err.Error())
			return
		}
		var same map[string]string
		must.NoError(t, json.Unmarshal([]byte(text), &same))
		must.Eq(t, same, fields)
	})
}
