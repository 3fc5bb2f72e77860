package stack

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
)

// WriteCallers writes a configuration file with one caller, who may write for the AI
// agents whose ID begins with prefix and do all of an operator's work. It returns the
// caller's token.
func WriteCallers(file, prefix string) (token string, err error) {
	token = "bvk_" + rand.Text()
	sum := sha256.Sum256([]byte(token))
	text := fmt.Sprintf(`token "caller" {
  sha256   = %q
  policies = ["caller"]
}

policy "caller" {
  agent_prefix %q {
    capabilities = ["write"]
  }
  operator = "write"
  metrics  = "read"
}
`, hex.EncodeToString(sum[:]), prefix)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return "", fmt.Errorf("stack: %w", err)
	}
	return token, nil
}
