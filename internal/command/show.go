package command

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/runtime"
)

func showJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// show prints an answer: v as JSON if the user asked for that, otherwise lines as a table.
func (c *command) show(v any, lines string) error {
	if c.asJSON {
		return showJSON(c.out, v)
	}
	return showTable(c.out, lines)
}

// printable returns text that does nothing to a terminal but show itself. Some text comes
// from sandboxes. Control characters other than line breaks and tabs are replaced, and so
// are characters that change the direction of text.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// showTable prints lines with their tab-separated columns aligned.
func showTable(w io.Writer, lines string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if _, err := io.WriteString(t, printable(lines)); err != nil {
		return err
	}
	return t.Flush()
}

func sessionLines(s wire.Session) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Chat\t%s\n", s.ChatID)
	fmt.Fprintf(&b, "Session\t%s\n", s.SessionID)
	fmt.Fprintf(&b, "Agent\t%s\n", s.AgentID)
	fmt.Fprintf(&b, "Volume\t%s\n", s.VolumeHostPath)
	fmt.Fprintf(&b, "Runtime\t%s\n", s.Runtime)
	fmt.Fprintf(&b, "Container\t%s\n", orDash(s.ContainerID))
	fmt.Fprintf(&b, "Endpoint\t%s\n", endpointOf(s))
	fmt.Fprintf(&b, "State\t%s\n", s.State)
	if s.Reason != "" {
		fmt.Fprintf(&b, "Reason\t%s\n", s.Reason)
	}
	if s.Warm {
		b.WriteString("Warm\tyes\n")
	}
	fmt.Fprintf(&b, "Owner\t%s\n", orDash(s.Owner))
	for i, key := range slices.Sorted(maps.Keys(s.Labels)) {
		name := "Labels"
		if i > 0 {
			name = ""
		}
		fmt.Fprintf(&b, "%s\t%s=%s\n", name, key, s.Labels[key])
	}
	fmt.Fprintf(&b, "Created\t%s\n", moment(s.CreatedAt))
	fmt.Fprintf(&b, "Expires\t%s\n", moment(s.ExpiresAt))
	return b.String()
}

func sessionTable(sessions []wire.Session) string {
	var b strings.Builder
	b.WriteString("CHAT\tSESSION\tSTATE\tENDPOINT\tEXPIRES\tRUNTIME\tAGENT\tVOLUME\tREASON\n")
	for _, s := range sessions {
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ChatID, s.SessionID, s.State, endpointOf(s),
			moment(s.ExpiresAt), s.Runtime, column(s.AgentID), column(s.VolumeHostPath), orDash(column(s.Reason)))
	}
	return b.String()
}

func endpointOf(s wire.Session) string {
	if s.Endpoint == nil || !s.Endpoint.IsValid() {
		return "-"
	}
	return s.Endpoint.AddrPort().String()
}

// maxColumn is the maximum length of a text in a table, in characters.
const maxColumn = 48

// column makes text fit into a table: one line, and not too long.
func column(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	if short := []rune(text); len(short) > maxColumn {
		return string(short[:maxColumn-1]) + "…"
	}
	return text
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func moment(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func pluginTable(plugins []pluginAnswer) string {
	var b strings.Builder
	b.WriteString("NAME\tCONFIGURED\tVERSION\tABILITIES\tERROR\n")
	for _, p := range plugins {
		info := runtime.Info{}
		if p.Info != nil {
			info = *p.Info
		}
		fmt.Fprintf(&b, "%s\t%t\t%s\t%s\t%s\n", p.Name, p.Configured, orDash(info.Version), abilities(info), orDash(p.Error))
	}
	return b.String()
}

func showPlugin(w io.Writer, info runtime.Info) error {
	if err := showTable(w, fmt.Sprintf("Name\t%s\nVersion\t%s\nAbilities\t%s\n", info.Name, info.Version, abilities(info))); err != nil {
		return err
	}
	if len(info.ConfigSchema) == 0 {
		_, err := fmt.Fprintln(w, "\nIt does not say which configuration it takes.")
		return err
	}
	_, err := fmt.Fprintf(w, "\nThe schema of its configuration:\n\n%s\n", info.ConfigSchema)
	return err
}

func abilities(info runtime.Info) string {
	var all []string
	for _, ability := range info.Abilities {
		all = append(all, string(ability))
	}
	return orDash(strings.Join(all, ","))
}

func showSandboxes(w io.Writer, sandboxes []runtime.Sandbox) error {
	var b strings.Builder
	b.WriteString("SESSION\tSTATE\tENDPOINT\tCONTAINER\tREASON\n")
	for _, s := range sandboxes {
		endpoint := "-"
		if s.Endpoint.IsValid() {
			endpoint = s.Endpoint.AddrPort().String()
		}
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\t%s\n", s.SessionID, s.State, endpoint, orDash(s.ContainerID), orDash(s.Reason))
	}
	return showTable(w, b.String())
}
