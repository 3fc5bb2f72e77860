package command

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

// jsonFlag adds the flag that [command.show] obeys.
func jsonFlag(c *command) {
	c.flags.BoolVar(&c.asJSON, "json", false, "Print JSON. An error is one line of JSON on stderr.")
}

func parseChatID(text string) (uuid.UUID, error) {
	id, err := uuid.Parse(text)
	if err != nil || len(text) != len(id.String()) { // Parse accepts other forms too
		return uuid.Nil, fmt.Errorf("CHAT_ID %q is not a UUID such as 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11", text)
	}
	return id, nil
}

// callAPI makes c a command that calls the API. call receives the chat ID from the first
// argument, if there is one.
func (c *command) callAPI(call func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error) {
	c.calls = true
	client := clientFlags(c)
	jsonFlag(c)
	c.run = func(ctx context.Context, args []string) error {
		var chat uuid.UUID
		var err error
		if len(args) > 0 {
			if chat, err = parseChatID(args[0]); err != nil {
				return err
			}
		}
		api, err := client()
		if err != nil {
			return err
		}
		return call(ctx, api, chat)
	}
}

func sessionCommand(t terminal) *command {
	c := newCommand(t, "session")
	c.synopsis = "Create, look at and end sessions"
	c.about = "Groups the commands for sessions. A session is a chat's one sandbox."
	return c
}

func sessionCreateCommand(t terminal) *command {
	c := newCommand(t, "session create")
	c.args = "CHAT_ID"
	c.synopsis = "Give a chat its sandbox"
	c.about = `Returns the chat's session when its sandbox answers. If the chat has none, it
creates one. While you wait it shows the stages of the start, except with -json.
Only the output of -json includes the sandbox's access token.`
	c.example = `$ bivouac session create -agent-id=helper -volume-host-path=/srv/chats/1 \
    8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11`
	var in apiclient.CreateInput
	c.flags.StringVar(&in.AgentID, "agent-id", "", "`ID` of the chat's AI agent. Required.")
	c.flags.StringVar(&in.VolumeHostPath, "volume-host-path", "", "`PATH` of the volume on the sandbox's machine. Required.")
	c.flags.StringVar(&in.Runtime, "runtime", "", "`NAME` of the runtime. (default that of the chat's session, or else the server's default)")
	c.flags.DurationVar(&in.TTL, "ttl", 0, "Time until the session expires, such as 90s or 30m. (default set by the server)")
	c.flags.Func("label", "`KEY=VALUE` of a label of the session. Repeat it for more.", func(text string) error {
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			return fmt.Errorf("%q is not of the form KEY=VALUE", text)
		}
		if _, ok := in.Labels[key]; ok {
			return fmt.Errorf("label %q is given twice", key)
		}
		if in.Labels == nil {
			in.Labels = make(map[string]string)
		}
		in.Labels[key] = value
		return nil
	})
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		began := time.Now()
		if !c.asJSON {
			in.Progress = func(stage runtime.Stage) {
				c.tell("%8s  %s", time.Since(began).Round(time.Millisecond), stage)
			}
		}
		created, err := api.Create(ctx, chat, in)
		if err != nil {
			return err
		}
		return c.show(created, "Result\t"+created.Result+"\n"+sessionLines(created.Session))
	})
	return c
}

func sessionGetCommand(t terminal) *command {
	c := newCommand(t, "session get")
	c.args = "CHAT_ID"
	c.synopsis = "Show a chat's session"
	c.about = `Shows the chat's session and the state of its sandbox. With -json the output
includes the sandbox's access token, if you may write to the session.`
	c.example = "$ bivouac session get 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		answer, _, err := api.Get(ctx, chat, apiclient.Block{})
		if err != nil {
			return err
		}
		return c.show(answer, sessionLines(answer.Session))
	})
	return c
}

func sessionListCommand(t terminal) *command {
	c := newCommand(t, "session list")
	c.synopsis = "List sessions"
	c.about = `Lists one page of sessions as they are recorded. Long values are cut off. Pass
-json to see them whole.`
	c.example = "$ bivouac session list -agent-id=helper"
	var in apiclient.ListInput
	c.flags.StringVar(&in.AgentID, "agent-id", "", "Only sessions of the AI agent with this `ID`.")
	c.flags.StringVar(&in.State, "state", "", "Only sessions in this `STATE`: creating, running, stopping, dead or lost.")
	c.flags.StringVar(&in.Text, "text", "", "Only sessions with this `TEXT`, in any case, in the chat ID, agent ID, labels or reason.")
	c.flags.IntVar(&in.PerPage, "per-page", 100, fmt.Sprintf("Number of sessions to show, 1 to %d.", apiclient.MaxPerPage))
	c.flags.StringVar(&in.NextToken, "next-token", "", "`TOKEN` at the end of the previous page.")
	c.callAPI(func(ctx context.Context, api *apiclient.Client, _ uuid.UUID) error {
		if in.PerPage < 1 || in.PerPage > apiclient.MaxPerPage {
			return fmt.Errorf("-per-page is %d, and must be 1 to %d", in.PerPage, apiclient.MaxPerPage)
		}
		page, _, err := api.List(ctx, in)
		if err != nil {
			return err
		}
		if err := c.show(page, sessionTable(page.Sessions)); err != nil {
			return err
		}
		if page.NextToken != "" && !c.asJSON {
			c.tell("There are more sessions. Show the next page with -next-token=%s", page.NextToken)
		}
		return nil
	})
	return c
}

func sessionRenewCommand(t terminal) *command {
	c := newCommand(t, "session renew")
	c.args = "CHAT_ID"
	c.synopsis = "Extend a chat's session"
	c.about = "Extends the session. It is never shortened, and one that has expired is past it."
	c.example = "$ bivouac session renew -ttl=1h 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	ttl := c.flags.Duration("ttl", 0, "Time from now until the session expires, such as 90s or 30m. (default set by the server)")
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		session, err := api.Renew(ctx, chat, *ttl)
		if err != nil {
			return err
		}
		return c.show(wire.SessionAnswer{Session: session}, sessionLines(session))
	})
	return c
}

func sessionDeleteCommand(t terminal) *command {
	c := newCommand(t, "session delete")
	c.args = "CHAT_ID"
	c.synopsis = "End a chat's session"
	c.about = "Ends the session, and returns once nothing of its sandbox runs. A chat without one is no error."
	c.example = "$ bivouac session delete 8a1f6c2e-5c0f-4f0e-9d6b-0c6f6f0f8f11"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, chat uuid.UUID) error {
		deleted, err := api.Delete(ctx, chat)
		if err != nil {
			return err
		}
		lines := fmt.Sprintf("Result\t%s\nChat\t%s\n", deleted.Result, deleted.ChatID)
		if deleted.Result == "deleted" {
			lines += fmt.Sprintf("Session\t%s\nContainer\t%s\n", deleted.SessionID, orDash(deleted.ContainerID))
		}
		return c.show(deleted, lines)
	})
	return c
}

var errNotCleaned = errors.New("some sessions that expired could not be ended; the server tries again")

func cleanupCommand(t terminal) *command {
	c := newCommand(t, "cleanup")
	c.synopsis = "End the sessions that have expired"
	c.about = "Ends the sessions that have expired. The server does so by itself from time to time."
	c.example = "$ bivouac cleanup"
	c.callAPI(func(ctx context.Context, api *apiclient.Client, _ uuid.UUID) error {
		cleaned, err := api.Cleanup(ctx)
		if err != nil {
			return err
		}
		lines := fmt.Sprintf("%d ended, %d failed\n", len(cleaned.Cleaned), cleaned.ErrorCount)
		if len(cleaned.Cleaned) > 0 {
			lines = sessionTable(cleaned.Cleaned) + lines
		}
		if err := c.show(cleaned, lines); err != nil {
			return err
		}
		if cleaned.ErrorCount > 0 {
			return errNotCleaned
		}
		return nil
	})
	return c
}
