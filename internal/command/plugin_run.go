package command

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/runtime"
)

// handLimit is how long a typed request may take.
const handLimit = 5 * time.Minute

func pluginRunCommand(t terminal) *command {
	c := newCommand(t, "plugin run")
	c.args = "PLUGIN"
	c.synopsis = "Run a plugin by itself and drive it by hand"
	c.about = `Runs the plugin as the server would, and reads requests from standard input, one
per line, until the end of input or Ctrl-C:

  create [VOLUME [CHAT_ID]]   a new session; prints its SESSION_ID
  inspect SESSION_ID
  list
  stop SESSION_ID
  delete SESSION_ID
  logs SESSION_ID [stderr]
  exec SESSION_ID COMMAND [ARGUMENT...]
  explain SESSION_ID
  info
  health

The plugin's log is shown. Sandboxes go on running when the command ends. The
next run with the same -instance finds them. Put a word with spaces in double
quotes. Exits with 1 if a request failed.`
	c.example = `$ echo create /srv/chats/1 | bivouac plugin run -plugin-config='{"image":"busybox"}' ./my-runtime`
	flags := newPluginFlags(c)
	settings := c.flags.String("plugin-config", "", "`JSON` object with the plugin's configuration. (default from its block)")
	instance := c.flags.String("instance", "plugin-run", "`NAME` of the Bivouac instance to pass to the plugin.")
	level := c.flags.String("log-level", "info", "`LEVEL` of the log: trace, debug, info, warn or error.")
	c.run = func(ctx context.Context, args []string) error {
		p, dir, err := flags.find(args[0])
		if err != nil {
			return err
		}
		if *settings != "" {
			p.Config = json.RawMessage(*settings)
		}
		log, err := pluginLogger(*level, c.err)
		if err != nil {
			return err
		}
		running, err := pluginhost.Start(ctx, pluginhost.Config{Dir: dir, Instance: *instance, Logger: log}, p)
		if err != nil {
			return err
		}
		defer running.End()
		return hand{c, running.Driver}.takeAll(ctx, c.in)
	}
	return c
}

// hand runs requests that a person types against a driver.
type hand struct {
	*command
	driver *pluginhost.Driver
}

var errRequestFailed = errors.New("some requests failed")

// takeAll runs the requests in in, one per line. It returns when ctx ends, even if a
// read is still blocked. That read lasts until the process ends.
func (h hand) takeAll(ctx context.Context, in io.Reader) error {
	lines := make(chan string)
	var readErr error // valid once lines is closed
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(in)
		for scanner.Scan() {
			select {
			case lines <- scanner.Text():
			case <-ctx.Done():
				return
			}
		}
		readErr = scanner.Err()
	}()
	var failed error
	for {
		select {
		case <-ctx.Done():
			return failed
		case line, ok := <-lines:
			if !ok {
				return errors.Join(failed, readErr)
			}
			words, err := wordsOf(line)
			if err == nil {
				err = h.take(ctx, words)
			}
			if err != nil {
				h.tell("Error: %v", err)
				failed = errRequestFailed
			}
		}
	}
}

// wordsOf splits a line at its spaces. A word that begins with a double quote is a
// quoted string as in Go or JSON, and may contain spaces.
func wordsOf(line string) ([]string, error) {
	var words []string
	for {
		line = strings.TrimSpace(line)
		if line == "" {
			return words, nil
		}
		end := strings.IndexFunc(line+" ", unicode.IsSpace)
		word := line[:end]
		if strings.HasPrefix(line, `"`) {
			quoted, err := strconv.QuotedPrefix(line)
			if err == nil {
				word, err = strconv.Unquote(quoted)
			}
			if err != nil {
				return nil, fmt.Errorf("%s is no word in double quotes", line)
			}
			end = len(quoted)
		}
		words = append(words, word)
		line = line[end:]
	}
}

func (h hand) take(ctx context.Context, words []string) error {
	if len(words) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, handLimit)
	defer cancel()
	if len(words) == 1 {
		words = append(words, "")
	}
	request, arg := words[0], words[1]
	if arg == "" && slices.Contains([]string{"inspect", "stop", "delete", "logs", "exec", "explain"}, request) {
		return fmt.Errorf("%s: SESSION_ID is missing", request)
	}
	switch request {
	case "create":
		return h.create(ctx, words[1:])
	case "list":
		return h.list(ctx)
	case "inspect":
		sandbox, err := h.driver.Inspect(ctx, arg)
		if err != nil {
			return err
		}
		return showSandboxes(h.out, []runtime.Sandbox{sandbox})
	case "info":
		info, err := h.driver.Info(ctx)
		if err != nil {
			return err
		}
		return showPlugin(h.out, info)
	case "stop":
		return h.done("stopped", h.driver.Stop(ctx, arg))
	case "delete":
		return h.done("deleted", h.driver.Delete(ctx, arg))
	case "health":
		return h.done("healthy", h.driver.Health(ctx))
	case "logs":
		return h.logs(ctx, arg, words[2:])
	case "exec":
		return h.exec(ctx, arg, words[2:])
	case "explain":
		return h.explain(ctx, arg)
	default:
		return fmt.Errorf("%q is none of create, inspect, list, stop, delete, logs, exec, explain, info, health", request)
	}
}

// done prints what a request did, unless it failed.
func (h hand) done(what string, err error) error {
	if err == nil {
		_, err = fmt.Fprintln(h.out, what)
	}
	return err
}

func (h hand) create(ctx context.Context, words []string) error {
	now := time.Now().UTC()
	spec := runtime.Spec{
		SessionID: uuid.NewString(), ChatID: uuid.NewString(), AgentID: "plugin-run",
		VolumeHostPath: words[0], CreatedAt: now, ExpiresAt: now.Add(time.Hour),
	}
	if spec.VolumeHostPath == "" {
		volume, err := os.MkdirTemp("", "bivouac-volume-")
		if err != nil {
			return err
		}
		spec.VolumeHostPath = volume
	}
	if len(words) > 1 {
		chat, err := parseChatID(words[1])
		if err != nil {
			return err
		}
		spec.ChatID = chat.String()
	}
	sandbox, err := h.driver.Create(ctx, spec, func(stage runtime.Stage) {
		h.tell("%8s  %s", time.Since(now).Round(time.Millisecond), stage)
	})
	if err != nil {
		// Clean up as a server does. If that fails, list shows what is left.
		return errors.Join(err, h.driver.Delete(ctx, spec.SessionID))
	}
	return showSandboxes(h.out, []runtime.Sandbox{sandbox})
}

func (h hand) list(ctx context.Context) error {
	var all []runtime.Sandbox
	for sandbox, err := range h.driver.List(ctx) {
		if err != nil {
			return err
		}
		all = append(all, sandbox)
	}
	return showSandboxes(h.out, all)
}

func (h hand) logs(ctx context.Context, sessionID string, words []string) error {
	query := runtime.LogQuery{Stream: runtime.Stdout}
	if len(words) > 0 {
		query.Stream = runtime.LogStream(words[0])
	}
	for chunk, err := range h.driver.Logs(ctx, sessionID, query) {
		if err != nil {
			return err
		}
		if _, err := h.out.Write(chunk.Data); err != nil {
			return err
		}
	}
	return nil
}

// exec runs a command without input, because the terminal has the requests.
func (h hand) exec(ctx context.Context, sessionID string, words []string) error {
	code, err := h.driver.Exec(ctx, sessionID, runtime.Command{Args: words}, runtime.Streams{Stdout: h.out, Stderr: h.err})
	return h.done(fmt.Sprintf("exit code %d", code), err)
}

func (h hand) explain(ctx context.Context, sessionID string) error {
	happenings, err := h.driver.Explain(ctx, sessionID)
	if err != nil {
		return err
	}
	for _, happening := range happenings {
		at := "-"
		if !happening.Time.IsZero() {
			at = happening.Time.Format(time.RFC3339)
		}
		if _, err := fmt.Fprintf(h.out, "%s  %s\n", at, happening.Text); err != nil {
			return err
		}
	}
	return nil
}
