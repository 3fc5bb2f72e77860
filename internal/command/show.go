package command

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/bivouac/bivouac/internal/httpapi/wire"
)

func showJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table aligns what print writes, with tabs between columns.
func table(w io.Writer, print func(io.Writer)) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	print(t)
	return t.Flush() // it has kept the first error
}

func showSession(w io.Writer, s wire.Session) error {
	return table(w, func(w io.Writer) { sessionRows(w, s) })
}

func showCreated(w io.Writer, created wire.CreateAnswer) error {
	return table(w, func(w io.Writer) {
		fmt.Fprintf(w, "Result\t%s\n", created.Result)
		sessionRows(w, created.Session)
	})
}

func sessionRows(w io.Writer, s wire.Session) {
	fmt.Fprintf(w, "Chat\t%s\n", s.ChatID)
	fmt.Fprintf(w, "Session\t%s\n", s.SessionID)
	fmt.Fprintf(w, "Agent\t%s\n", s.AgentID)
	fmt.Fprintf(w, "Volume\t%s\n", s.VolumeHostPath)
	fmt.Fprintf(w, "Runtime\t%s\n", s.Runtime)
	fmt.Fprintf(w, "Container\t%s\n", orDash(s.ContainerID))
	fmt.Fprintf(w, "Endpoint\t%s\n", endpointOf(s))
	fmt.Fprintf(w, "State\t%s\n", s.State)
	if s.Reason != "" {
		fmt.Fprintf(w, "Reason\t%s\n", s.Reason)
	}
	fmt.Fprintf(w, "Created\t%s\n", moment(s.CreatedAt))
	fmt.Fprintf(w, "Expires\t%s\n", moment(s.ExpiresAt))
}

func showSessions(w io.Writer, sessions []wire.Session) error {
	return table(w, func(w io.Writer) {
		fmt.Fprintln(w, "CHAT\tSTATE\tENDPOINT\tEXPIRES\tAGENT\tVOLUME")
		for _, s := range sessions {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n",
				s.ChatID, s.State, endpointOf(s), moment(s.ExpiresAt), s.AgentID, s.VolumeHostPath)
		}
	})
}

func showDeleted(w io.Writer, deleted wire.DeleteAnswer) error {
	return table(w, func(w io.Writer) {
		fmt.Fprintf(w, "Result\t%s\n", deleted.Result)
		fmt.Fprintf(w, "Chat\t%s\n", deleted.ChatID)
		if deleted.Result == "deleted" {
			fmt.Fprintf(w, "Session\t%s\n", deleted.SessionID)
			fmt.Fprintf(w, "Container\t%s\n", orDash(deleted.ContainerID))
		}
	})
}

func showCleaned(w io.Writer, cleaned wire.CleanupAnswer) error {
	if len(cleaned.Cleaned) > 0 {
		if err := showSessions(w, cleaned.Cleaned); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%d ended, %d failed\n", len(cleaned.Cleaned), cleaned.ErrorCount)
	return err
}

func endpointOf(s wire.Session) string {
	if s.Endpoint == nil || !s.Endpoint.IsValid() {
		return "-"
	}
	return s.Endpoint.AddrPort().String()
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func moment(t time.Time) string { return t.UTC().Format(time.RFC3339) }
