package command

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
)

func operatorCommand(t terminal) *command {
	c := newCommand(t, "operator")
	c.synopsis = "Decide what only an operator can"
	c.about = `Groups the commands for data that was lost, damaged or edited in Consul. Use
adopt or forget for a store without an identity, and repair for the record of
one chat. The server's health names the command that helps.`
	return c
}

func operatorAdoptCommand(t terminal) *command {
	c := newCommand(t, "operator adopt")
	c.synopsis = "Take over the sandboxes of a store that lost its data"
	c.about = `Writes this Bivouac's identity to a store that lost its data, and then writes a
record for each running sandbox. A server that started after the loss does not
know its identity: pass -instance, with the ID in the sandboxes that run under
its name. Make sure that they are not another Bivouac's. If you can restore
Consul from a snapshot, do that instead.`
	c.example = "$ bivouac operator adopt -instance=default-4f7k2mq6zt3vxw5yabcd"
	instance := c.flags.String("instance", "", "`ID` of the instance to take over. (default the one that the server had)")
	c.callAPI(func(ctx context.Context, api *apiclient.Client, _ uuid.UUID) error {
		adopted, err := api.Adopt(ctx, *instance)
		if err != nil {
			return err
		}
		return c.show(adopted, fmt.Sprintf("Instance %s: %d sandboxes were given a record, %d could not be\n",
			adopted.Instance, adopted.Adopted, adopted.Failed))
	})
	return c
}

func operatorRepairCommand(t terminal) *command {
	c := newCommand(t, "operator repair")
	c.args = "CHAT_ID"
	c.synopsis = "Repair a chat's record"
	c.about = `Repairs a chat's record that cannot be read, or that names a dead session or a
session of another chat. If a sandbox of the chat runs, its record is written
again from what the sandbox was created with, and the session goes on.
Otherwise an unusable record is removed. A sandbox for which no record can be
written is ended. A correct record is not changed.`
	c.example = "$ bivouac operator repair 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		repaired, err := api.Repair(ctx, chat)
		if err != nil {
			return err
		}
		lines := fmt.Sprintf("Result\t%s\n", repaired.Result)
		if repaired.Session != nil {
			lines += sessionLines(*repaired.Session)
		}
		return c.show(repaired, lines)
	})
	return c
}

func operatorForgetCommand(t terminal) *command {
	c := newCommand(t, "operator forget")
	c.synopsis = "Leave the sandboxes that run to another Bivouac"
	c.about = `Writes a new identity to a store that has none. Sandboxes that already run under
the same name are treated as another Bivouac's and left alone. The command
prints how to list them. A server that had another identity stops and must be
started again.`
	c.example = "$ bivouac operator forget"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, _ uuid.UUID) error {
		forgotten, err := api.Forget(ctx)
		if err != nil {
			return err
		}
		var lines strings.Builder
		fmt.Fprintf(&lines, "Instance %s\n", forgotten.Instance)
		for _, left := range forgotten.Left {
			fmt.Fprintf(&lines, "%d sandboxes of instance %s are left alone. They are shown by\n  %s\n",
				left.Sandboxes, left.Instance, left.Look)
		}
		return c.show(forgotten, lines.String())
	})
	return c
}
