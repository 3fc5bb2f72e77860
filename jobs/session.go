package jobs

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/zclconf/go-cty/cty"

	"github.com/bivouac/bivouac/runtime"
)

// freeText marks values that somebody outside chose, so that the decoder can
// refuse them where Nomad would read more than data in them.
const freeText = "free text"

// sessionValue is what templates see as session.
func sessionValue(spec runtime.Spec) cty.Value {
	return cty.ObjectVal(map[string]cty.Value{
		"id":               cty.StringVal(spec.SessionID),
		"chat_id":          cty.StringVal(spec.ChatID),
		"agent_id":         cty.StringVal(spec.AgentID).Mark(freeText),
		"volume_host_path": cty.StringVal(spec.VolumeHostPath).Mark(freeText),
	})
}

// Fingerprint tells specs apart: equal for two specs that stand for the same
// sandbox. Times are not part of it.
func Fingerprint(spec runtime.Spec) string {
	hash := sha256.New()
	for _, s := range []string{spec.SessionID, spec.ChatID, spec.AgentID, spec.VolumeHostPath} {
		fmt.Fprintf(hash, "%d:%s", len(s), s)
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// SpecOf returns the spec that a job was made from, as its meta says. It returns
// false if the meta lacks a part of it, or if the parts do not fit the meta's
// fingerprint, as in a job of an older version or one that was edited.
func SpecOf(meta map[string]string) (runtime.Spec, bool) {
	created, createdErr := time.Parse(time.RFC3339Nano, meta[MetaCreatedAt])
	expires, expiresErr := time.Parse(time.RFC3339Nano, meta[MetaExpiresAt])
	spec := runtime.Spec{
		SessionID:      meta[MetaSessionID],
		ChatID:         meta[MetaChatID],
		AgentID:        meta[MetaAgentID],
		VolumeHostPath: meta[MetaVolumeHostPath],
		CreatedAt:      created.UTC(),
		ExpiresAt:      expires.UTC(),
	}
	if createdErr != nil || expiresErr != nil || spec.Validate() != nil || meta[MetaSpec] != Fingerprint(spec) {
		return runtime.Spec{}, false
	}
	return spec, true
}

func sampleSpec() runtime.Spec {
	return runtime.Spec{
		SessionID:      "00000000-0000-4000-8000-000000000001",
		ChatID:         "00000000-0000-4000-8000-000000000002",
		AgentID:        "agent",
		VolumeHostPath: "/volume",
		CreatedAt:      time.Unix(0, 0).UTC(),
		ExpiresAt:      time.Unix(0, 0).UTC(),
	}
}
