package command

import (
	"context"
	"fmt"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/apiclient"
)

func operatorCommand(t terminal) *command {
	c := newCommand(t, "operator")
	c.synopsis = "Mend what was damaged from outside"
	c.about = "Groups the commands for operators. The check \"sessions\" of a server's health names the one that helps."
	return c
}

func operatorRepairCommand(t terminal) *command {
	var asJSON *bool
	c := sessionCommandOf(t, "operator repair", func(c *command) {
		asJSON = jsonFlag(c)
	}, func(ctx context.Context, c *command, api *apiclient.Client, chat uuid.UUID) error {
		repaired, err := api.Repair(ctx, chat)
		if err != nil {
			return err
		}
		if *asJSON {
			return showJSON(c.out, repaired)
		}
		lines := fmt.Sprintf("Result\t%s\n", repaired.Result)
		if repaired.Session != nil {
			lines += sessionLines(*repaired.Session)
		}
		return showTable(c.out, lines)
	})
	c.args = "CHAT_ID"
	c.synopsis = "Repair a chat's record"
	c.about = `Mends a record that cannot be understood, or that names a session which is
not alive or is another chat's. If a sandbox of the chat runs, the record is
written anew from what the sandbox was created with, and the session goes on.
Otherwise a record that cannot be used is removed. A sandbox of the chat that no
record can be made of is ended. A record that is well stays as it is.`
	c.example = "$ bivouac operator repair 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	return c
}
