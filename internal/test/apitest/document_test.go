package apitest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/api"
)

// failures is a testing.TB that collects its failures.
type failures struct {
	testing.TB
	all []string
}

func (f *failures) Errorf(format string, args ...any) {
	f.all = append(f.all, fmt.Sprintf(format, args...))
}

func TestCheckDocument(t *testing.T) {
	for name, test := range map[string]struct{ from, to, says string }{
		"accepts the document":                      {`"openapi"`, `"openapi"`, ""},
		"wants valid OpenAPI":                       {`"operationId": "listSessions"`, `"operationId": 5`, "operationId"},
		"wants an operation ID":                     {`"operationId": "listSessions",`, ``, "GET /v1/sessions has no operationId"},
		"wants an operation ID of its own":          {`"operationId": "listSessions"`, `"operationId": "createSession"`, "has no operationId of its own"},
		"wants a summary":                           {`"summary": "List sessions",`, ``, "GET /v1/sessions has no summary"},
		"wants a tag that is described":             {`"name": "operator",`, `"name": "other",`, "has no tag that the document describes"},
		"wants a description of each parameter":     {`"description": "Only the sessions of this AI agent",`, ``, "parameter agent_id has no description"},
		"wants examples that fit":                   {`"session_id": "0f0c3c1a-6c1d-4f0e-9a53-0d9a7f3b8a10"`, `"session_id": "x"`, "its example"},
		"wants examples of parameters that fit":     {`"example": "researcher"`, `"example": 5`, "parameter agent_id: its example"},
		"wants properties in snake_case":            {`"properties": {`, `"properties": {"camelCase": {"type": "string"},`, `"camelCase" is not in snake_case`},
		"wants no component that nothing refers to": {`"schemas": {`, `"schemas": {"Old": {"type": "string"},`, "#/components/schemas/Old is not referred to"},
	} {
		t.Run(name, func(t *testing.T) {
			document := strings.Replace(string(api.OpenAPI), test.from, test.to, 1)
			must.StrContains(t, string(api.OpenAPI), test.from)
			found := &failures{TB: t}
			newRecorder(found, nil, []byte(document)).CheckDocument()
			if test.says == "" {
				must.SliceEmpty(t, found.all)
				return
			}
			must.StrContains(t, strings.Join(found.all, "\n"), test.says)
		})
	}
}
