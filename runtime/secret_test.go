package runtime_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

func TestSecret(t *testing.T) {
	const text = "6c6f6e67"
	spec := runtime.Spec{AgentID: "agent-1", AccessToken: text}

	t.Run("is_printed_by_no_verb", func(t *testing.T) {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%20s", "%!"} {
			for _, value := range []any{spec.AccessToken, spec, &spec, []any{spec}, map[string]runtime.Spec{"a": spec}} {
				printed := fmt.Sprintf(verb, value)
				must.StrNotContains(t, printed, text)
				must.StrNotContains(t, printed, fmt.Sprintf("%x", text))
			}
		}
		must.Eq(t, "redacted", spec.AccessToken.String())
		must.StrContains(t, fmt.Sprintf("%+v", spec), "AccessToken:redacted")
	})
	t.Run("is_not_in_logs", func(t *testing.T) {
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("created", "token", spec.AccessToken, "spec", spec)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("created", "token", spec.AccessToken, "spec", spec)
		must.StrContains(t, log.String(), "token=redacted")
		must.StrContains(t, log.String(), `"token":"redacted"`)
		must.StrNotContains(t, log.String(), text)
	})
	t.Run("is_not_in_JSON_and_not_in_that_of_a_spec", func(t *testing.T) {
		written, err := json.Marshal(map[string]any{"token": spec.AccessToken})
		must.NoError(t, err)
		must.Eq(t, `{"token":"redacted"}`, string(written))

		written, err = json.Marshal(spec)
		must.NoError(t, err)
		must.StrNotContains(t, string(written), text)
		var read runtime.Spec
		must.NoError(t, json.Unmarshal(written, &read))
		must.Eq(t, "", string(read.AccessToken), must.Sprint("a driver must not take a placeholder for a token"))
	})
	t.Run("that_is_empty_prints_nothing", func(t *testing.T) {
		must.Eq(t, "", runtime.Secret("").String())
	})
}

func TestSecret_is_hidden_in_what_a_sandbox_printed(t *testing.T) {
	must.Eq(t, "a [access token] b [access token]", runtime.Secret("s3cret").HideIn("a s3cret b s3cret"))
	must.Eq(t, "nothing to hide", runtime.Secret("").HideIn("nothing to hide"))
}
