package runtime_test

import (
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

func TestValidName(t *testing.T) {
	for name, valid := range map[string]bool{
		"a": true, "my-runtime-2": true, strings.Repeat("a", 64): true,
		"": false, "-a": false, "A": false, "a_b": false, "ä": false, "a/b": false, strings.Repeat("a", 65): false,
	} {
		must.Eq(t, valid, runtime.ValidName(name), must.Sprint(name))
	}
}

func TestSpec_Validate(t *testing.T) {
	good := runtime.Spec{
		SessionID: "00000000-0000-4000-8000-000000000001", ChatID: "00000000-0000-4000-8000-00000000000a",
		AgentID: "agent $ { %", VolumeHostPath: "/volumes/$a",
	}
	must.NoError(t, good.Validate())
	good.AccessToken = runtime.Secret(strings.Repeat("0f", 32))
	must.NoError(t, good.Validate())
	for want, change := range map[string]func(*runtime.Spec){
		`session ID "x" is not a UUID`:          func(s *runtime.Spec) { s.SessionID = "x" },
		`chat ID "" is not a UUID`:              func(s *runtime.Spec) { s.ChatID = "" },
		"is not a UUID in lower case":           func(s *runtime.Spec) { s.ChatID = strings.ToUpper(s.ChatID) },
		"agent ID is empty":                     func(s *runtime.Spec) { s.AgentID = "" },
		"agent ID is over 256 bytes":            func(s *runtime.Spec) { s.AgentID = strings.Repeat("a", 257) },
		"agent ID is not UTF-8":                 func(s *runtime.Spec) { s.AgentID = "\xff" },
		"agent ID has a control character":      func(s *runtime.Spec) { s.AgentID = "a\nb" },
		`agent ID has "${" or "%{"`:             func(s *runtime.Spec) { s.AgentID = "%{ if true }" },
		`volume host path has "${" or "%{"`:     func(s *runtime.Spec) { s.VolumeHostPath = "/${x}" },
		"volume host path is not absolute":      func(s *runtime.Spec) { s.VolumeHostPath = "a" },
		"volume host path is not clean":         func(s *runtime.Spec) { s.VolumeHostPath = "/a/../b" },
		"volume host path is over 4096 bytes":   func(s *runtime.Spec) { s.VolumeHostPath = "/" + strings.Repeat("a", 4096) },
		"volume host path has a control charac": func(s *runtime.Spec) { s.VolumeHostPath = "/a\x00" },
		"access token is not 64 hexadecimal":    func(s *runtime.Spec) { s.AccessToken = s.AccessToken[1:] },
		"hexadecimal digits in lower case":      func(s *runtime.Spec) { s.AccessToken = runtime.Secret(strings.Repeat("0F", 32)) },
	} {
		bad := good
		change(&bad)
		err := bad.Validate()
		must.ErrorContains(t, err, want)
		must.StrNotContains(t, err.Error(), string(bad.AccessToken))
	}
}

func TestSpec_Validate_of_a_spare(t *testing.T) {
	spare := runtime.Spec{SessionID: "00000000-0000-4000-8000-000000000001", Pool: "small"}
	must.NoError(t, spare.Validate())
	for want, change := range map[string]func(*runtime.Spec){
		`pool "S" is not a valid name`: func(s *runtime.Spec) { s.Pool = "S" },
		"a spare has no chat":          func(s *runtime.Spec) { s.ChatID = s.SessionID },
		"a spare has no chat, agent":   func(s *runtime.Spec) { s.AgentID = "agent" },
		"or volume host path":          func(s *runtime.Spec) { s.VolumeHostPath = "/volumes/a" },
		"session ID":                   func(s *runtime.Spec) { s.SessionID = "" },
	} {
		bad := spare
		change(&bad)
		must.ErrorContains(t, bad.Validate(), want)
	}
}
