package command

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
)

func poolCommand(t terminal) *command {
	c := newCommand(t, "pool")
	c.synopsis = "Look at the pools of spares"
	c.about = `Groups the commands for pools. A pool keeps sandboxes started before a chat needs
them. These are its spares.`
	return c
}

func poolListCommand(t terminal) *command {
	c := newCommand(t, "pool list")
	c.synopsis = "List pools"
	c.about = `Lists the pools and how many spares each has. You must be allowed to read all
sessions. Pools are defined in the server's configuration.`
	c.example = "$ bivouac pool list"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, _ uuid.UUID) error {
		answer, err := api.Pools(ctx)
		if err != nil {
			return err
		}
		return c.show(answer, poolTable(answer.Pools))
	})
	return c
}

func poolTable(pools []wire.Pool) string {
	var b strings.Builder
	b.WriteString("NAME\tRUNTIME\tSIZE\tREADY\tSTARTING\tENDING\n")
	for _, p := range pools {
		fmt.Fprintf(&b, "%s\t%s\t%d\t%d\t%d\t%d\n", p.Name, p.Runtime, p.Size, p.Ready, p.Starting, p.Ending)
	}
	return b.String()
}
