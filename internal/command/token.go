package command

import (
	"context"
	"encoding/hex"
	"fmt"

	"github.com/bivouac/bivouac/internal/auth"
	"github.com/bivouac/bivouac/internal/config"
)

func tokenCommand(t terminal) *command {
	c := newCommand(t, "token")
	c.synopsis = "Make tokens for callers"
	c.about = `Groups the commands for the tokens with which callers authenticate.`
	return c
}

func tokenNewCommand(t terminal) *command {
	c := newCommand(t, "token new")
	c.args = "NAME"
	c.synopsis = "Make a token"
	c.about = `Prints the secret of a new token, and the block for the server's configuration,
which contains only the secret's SHA-256. The secret is printed this once and
stored nowhere. NAME is the name of the caller in logs, and the owner of the
sessions that it creates.`
	c.example = "$ bivouac token new ci"
	c.run = func(_ context.Context, args []string) error {
		if err := config.CheckCallerName(args[0]); err != nil {
			return err
		}
		secret, sum := auth.NewSecret()
		_, err := fmt.Fprintf(c.out, `Secret, printed only this once:

  %s

For the server's configuration:

  token %q {
    sha256   = %q
    policies = []
  }
`, secret, args[0], hex.EncodeToString(sum[:]))
		return err
	}
	return c
}
