package jsonfields_test

import (
	"encoding/json"
	"maps"
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
		`{"a":null,"b":"2"}`:              {"b": "2"},
	} {
		fields, _, err := jsonfields.Parse(text, []string{"a", "b"}, nil)
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
		{"a name that stands twice, as null", `{"a":null,"a":"2"}`, "duplicate field a"},
		{"a number", `{"a":1}`, "a is not a string"},
		{"an object for a string", `{"a":{}}`, "a is not a string"},
		{"half a surrogate pair", `{"a":"\ud800"}`, "a is not Unicode"},
		{"bytes that are not UTF-8", "{\"a\":\"1\xff\"}", "a is not Unicode"},
		{"two objects", `{}{}`, "goes on"},
		{"something after the object", `{} ]`, "goes on"},
	}
	for _, c := range cases {
		t.Run(c.when, func(t *testing.T) {
			_, _, err := jsonfields.Parse(c.text, []string{"a", "b"}, nil)
			must.ErrorContains(t, err, c.says)
		})
	}
}

func TestParseNested(t *testing.T) {
	parse := func(text string) (map[string]string, map[string]map[string]string, error) {
		return jsonfields.Parse(text, []string{"a"}, []string{"o", "p"})
	}
	t.Run("reads_objects_of_strings", func(t *testing.T) {
		fields, objects, err := parse(`{"o":{"x":"1","":"\u00e4"},"a":"2","p":{}}`)
		must.NoError(t, err)
		must.Eq(t, map[string]string{"a": "2"}, fields)
		must.Eq(t, map[string]map[string]string{"o": {"x": "1", "": "ä"}, "p": {}}, objects)
	})
	t.Run("takes_null_for_absent", func(t *testing.T) {
		_, objects, err := parse(`{"o":null}`)
		must.NoError(t, err)
		must.MapEmpty(t, objects)
	})
	for text, says := range map[string]string{
		`{"o":"x"}`:                "o is not an object",
		`{"o":["x"]}`:              "o is not an object",
		`{"a":{"x":"1"}}`:          "a is not a string",
		`{"o":{"x":null}}`:         "o.x is not a string",
		`{"o":{"x":{}}}`:           "o.x is not a string",
		`{"o":{"x":"1","x":"1"}}`:  "duplicate field o.x",
		`{"o":{"x":"1"},"o":{}}`:   "duplicate field o",
		`{"o":{"\ud800":"1"}}`:     "a name that is not Unicode",
		"{\"o\":{\"x\":\"\xff\"}}": "o.x is not Unicode",
		`{"o":{"x":"1"`:            "not JSON",
		`{"o":{"x"}}`:              "not JSON",
		`{"o":{"x":"1"]}`:          "not JSON",
	} {
		t.Run("refuses_"+text, func(t *testing.T) {
			_, _, err := parse(text)
			must.ErrorContains(t, err, says)
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
		fields, _, err := jsonfields.Parse(text, []string{"a", "b"}, nil)
		if err != nil {
			must.NotEq(t, "", err.Error())
			return
		}
		var same map[string]*string
		must.NoError(t, json.Unmarshal([]byte(text), &same))
		maps.DeleteFunc(same, func(_ string, value *string) bool { return value == nil })
		must.MapLen(t, len(same), fields)
		for name, value := range same {
			must.Eq(t, *value, fields[name])
		}
	})
}

func TestParseLists(t *testing.T) {
	for text, want := range map[string][]string{
		`{"l":[]}`:                {},
		`{"l":["a","","\u00e4"]}`: {"a", "", "ä"},
		`{"l":null}`:              nil,
		`{}`:                      nil,
	} {
		_, _, lists, err := jsonfields.ParseLists(text, nil, nil, []string{"l"})
		must.NoError(t, err)
		must.Eq(t, want, lists["l"])
	}
	for text, says := range map[string]string{
		`{"l":"a"}`:            "l is not a list",
		`{"l":{"a":"b"}}`:      "l is not a list",
		`{"l":["a",1]}`:        "l.1 is not a string",
		`{"l":["a",["b"]]}`:    "l.1 is not a string",
		`{"l":["a","\ud800"]}`: "l.1 is not Unicode text",
		`{"l":["a"`:            "not JSON",
		`{"l":["a"],"l":[]}`:   "duplicate field l",
	} {
		_, _, _, err := jsonfields.ParseLists(text, nil, nil, []string{"l"})
		must.ErrorContains(t, err, says)
	}
}
