package jobs

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/zclconf/go-cty/cty"

	"github.com/bivouac/bivouac/runtime"
)

// freeText marks values that a caller chose freely. The decoder refuses them
// wherever Nomad would not treat them as plain data.
const freeText = "free text"

// notYet is in the place of what a spare does not have before its claim. The decoder refuses
// the job of a spare that contains it. A mark could not show that: HCL gives the result of
// a condition the marks of both its branches.
const notYet = "bivouac-spare-has-none"

// sessionValue returns the value of session in templates.
func sessionValue(spec runtime.Spec) cty.Value {
	spare := spec.Pool != ""
	if spare {
		spec.ChatID, spec.AgentID, spec.VolumeHostPath = notYet, notYet, notYet
	}
	return cty.ObjectVal(map[string]cty.Value{
		"id":               cty.StringVal(spec.SessionID),
		"chat_id":          cty.StringVal(spec.ChatID),
		"agent_id":         cty.StringVal(spec.AgentID).Mark(freeText),
		"volume_host_path": cty.StringVal(spec.VolumeHostPath).Mark(freeText),
		"spare":            cty.BoolVal(spare),
	})
}

// description is what a job's meta says about its session besides what the sandbox
// was made from.
type description struct {
	Owner  string            `json:"owner,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
}

// plainJSON writes the characters that Nomad would interpolate as escapes. In
// JSON they stand in strings only.
var plainJSON = strings.NewReplacer("$", `\u0024`, "%", `\u0025`)

func descriptionOf(spec runtime.Spec) string {
	text, err := json.Marshal(description{Owner: spec.Owner, Labels: spec.Labels})
	if err != nil {
		panic(err) // strings can always be encoded
	}
	return plainJSON.Replace(string(text))
}

// Fingerprint returns a hash of spec without its times, owner, labels and access token.
// Two specs have the same fingerprint if they describe the same sandbox. A session has
// one access token for its whole life, so the hash need not include it.
func Fingerprint(spec runtime.Spec) string {
	hash := sha256.New()
	parts := []string{spec.SessionID, spec.ChatID, spec.AgentID, spec.VolumeHostPath}
	if spec.Pool != "" {
		parts = append(parts, spec.Pool)
	}
	for _, s := range parts {
		fmt.Fprintf(hash, "%d:%s", len(s), s)
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// MetaOf returns the meta that [SpecOf] reads a spec from. It has no access token.
func MetaOf(spec runtime.Spec) map[string]string {
	meta := map[string]string{
		MetaSessionID:   spec.SessionID,
		MetaSpec:        Fingerprint(spec),
		MetaCreatedAt:   spec.CreatedAt.UTC().Format(time.RFC3339Nano),
		MetaExpiresAt:   spec.ExpiresAt.UTC().Format(time.RFC3339Nano),
		MetaDescription: descriptionOf(spec),
	}
	if spec.Pool != "" {
		meta[MetaPool] = spec.Pool
	} else {
		meta[MetaChatID], meta[MetaAgentID], meta[MetaVolumeHostPath] = spec.ChatID, spec.AgentID, spec.VolumeHostPath
	}
	return meta
}

// SpecOf returns the spec that a job was made from, read from the job's meta, which
// has no access token. It returns false if a part is missing or if the parts do not
// match the fingerprint. This happens with a job of an older Bivouac and with one
// that was edited. A job from before owners and labels has neither.
func SpecOf(meta map[string]string) (runtime.Spec, bool) {
	created, createdErr := time.Parse(time.RFC3339Nano, meta[MetaCreatedAt])
	expires, expiresErr := time.Parse(time.RFC3339Nano, meta[MetaExpiresAt])
	spec := runtime.Spec{
		SessionID:      meta[MetaSessionID],
		ChatID:         meta[MetaChatID],
		AgentID:        meta[MetaAgentID],
		VolumeHostPath: meta[MetaVolumeHostPath],
		Pool:           meta[MetaPool],
		CreatedAt:      created.UTC(),
		ExpiresAt:      expires.UTC(),
	}
	if text, ok := meta[MetaDescription]; ok {
		var about description
		if err := json.Unmarshal([]byte(text), &about); err != nil {
			return runtime.Spec{}, false
		}
		spec.Owner, spec.Labels = about.Owner, about.Labels
	}
	if createdErr != nil || expiresErr != nil || spec.Validate() != nil || meta[MetaSpec] != Fingerprint(spec) {
		return runtime.Spec{}, false
	}
	return spec, true
}

// sampleVolume is a path that no template has of its own.
const sampleVolume = "/bivouac-sample-volume"

func sampleSpec() runtime.Spec {
	return runtime.Spec{
		SessionID:      "00000000-0000-4000-8000-000000000001",
		ChatID:         "00000000-0000-4000-8000-000000000002",
		AgentID:        "agent",
		VolumeHostPath: sampleVolume,
		CreatedAt:      time.Unix(0, 0).UTC(),
		ExpiresAt:      time.Unix(0, 0).UTC(),
	}
}
