package stack

import (
	"encoding/hex"
	"fmt"
	"os"

	"github.com/bivouac/bivouac/internal/auth"
)

// WriteCallers writes a configuration file with one caller, who may write for the AI
// agents whose ID begins with prefix and do all of an operator's work. It returns the
// caller's token.
func WriteCallers(file, prefix string) (token string, err error) {
	token, sum := auth.NewSecret()
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
