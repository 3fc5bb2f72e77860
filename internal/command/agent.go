package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/bivouac/bivouac/internal/agent"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/demosandbox"
	"github.com/bivouac/bivouac/internal/version"
)

func agentCommand(t terminal) *command {
	c := newCommand(t, "agent")
	c.synopsis = "Run a Bivouac server"
	c.about = `Runs a Bivouac server until it receives SIGINT or SIGTERM. It then refuses new
requests and finishes those in progress. After 25 s it answers the remaining
ones with 503 and undoes what they began. It exits with 0, or with 1 if
stopping took more than 45 s. A second signal ends it at once. On SIGHUP it
reads tokens, certificates and keys in files again, and opens its audit logs again.

Flags override configuration files. Consul and Nomad addresses can also be set
through CONSUL_HTTP_* and NOMAD_*. Configuration files override those.`
	c.example = `$ bivouac agent -dev
$ bivouac agent -config=/etc/bivouac.d -volume-root=/srv/chats`
	var flags config.Flags
	flags.Register(c.flags)
	c.run = func(ctx context.Context, _ []string) error {
		settings, err := flags.Load()
		if err != nil {
			return err
		}
		hangups, done := survive()
		defer done()
		return agent.Run(ctx, settings, agent.Environment{
			Program: c.program, Stdout: c.out, Stderr: c.err, Hangups: hangups,
			NotifySocket: c.getenv("NOTIFY_SOCKET"),
		})
	}
	return c
}

// survive keeps SIGHUP and SIGPIPE from ending the process until done is called. It
// returns a channel that receives each SIGHUP. It does not use signal.Ignore, because
// the programs that this one starts would inherit that.
func survive() (hangups <-chan os.Signal, done func()) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	// Nothing receives from this channel. A write to a pipe without a reader just
	// fails.
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	return hup, func() {
		signal.Stop(hup)
		signal.Stop(pipe)
	}
}

func configCommand(t terminal) *command {
	c := newCommand(t, "config")
	c.synopsis = "Work with configuration files"
	c.about = "Groups the commands for configuration files."
	return c
}

func configValidateCommand(t terminal) *command {
	c := newCommand(t, "config validate")
	c.synopsis = "Check a configuration"
	c.about = `Reads configuration files, flags and the job template as the server does, and
reports what is wrong with them. It starts each configured plugin for a moment
to check its configuration. It does not contact Consul or Nomad.`
	c.example = "$ bivouac config validate -config=/etc/bivouac.d"
	var flags config.Flags
	flags.Register(c.flags)
	c.run = func(ctx context.Context, _ []string) error {
		settings, err := flags.Load()
		if err != nil {
			return err
		}
		if err := agent.Validate(ctx, settings); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.out, "The configuration is valid.")
		return err
	}
	return c
}

func versionCommand(t terminal) *command {
	c := newCommand(t, "version")
	c.synopsis = "Print the version"
	c.about = "Prints the version, the commit that it was built from, and the version of Go."
	c.example = "$ bivouac version -json"
	jsonFlag(c)
	c.run = func(context.Context, []string) error { return c.show(version.Get(), version.Get().String()+"\n") }
	return c
}

func demoSandboxCommand(t terminal) *command {
	c := newCommand(t, "demo-sandbox")
	c.synopsis = "Run a small sandbox to try Bivouac out with"
	c.about = `Serves HTTP as a sandbox does. / shows the session, chat and agent that it
serves, /workspace/ lists and serves the files of the volume, /healthz returns
the session ID, a POST to /exit ends it, and a POST to /print prints the body,
with ?stream=stderr to its standard error. Like any sandbox it reads PORT,
BIVOUAC_SESSION_ID, BIVOUAC_CHAT_ID, BIVOUAC_AGENT_ID, BIVOUAC_WORKSPACE and
BIVOUAC_ACCESS_TOKEN from its environment. If BIVOUAC_SESSION_FILE is set, it
reads chat and agent from that file as soon as it exists. It listens on
127.0.0.1, or on the IP in BIVOUAC_BIND.`
	c.example = "$ PORT=8080 BIVOUAC_WORKSPACE=/tmp bivouac demo-sandbox"
	settings := demosandbox.FromEnv(t.getenv)
	c.flags.StringVar(&settings.Addr, "addr", settings.Addr, "`HOST:PORT` to listen on.")
	c.flags.BoolVar(&settings.RequireToken, "require-token", false,
		"Refuse requests without \"Authorization: Bearer\" and the access token, except GET /healthz.")
	actions := c.flags.String("do", "", "`ACTIONS` to do instead, as bivouac plugin verify has them done by commands in a sandbox.")
	c.run = func(ctx context.Context, _ []string) error {
		if *actions != "" {
			os.Exit(demosandbox.Do(*actions)) //nolint:forbidigo // the exit code is one of the actions
		}
		return demosandbox.Run(ctx, settings)
	}
	return c
}

func devCleanupCommand(t terminal) *command {
	c := newCommand(t, agent.DevCleanup)
	c.args = "FOLDER"
	c.synopsis = "End the sandboxes of agents with -dev that were killed"
	c.about = `Waits until its standard input ends. It then ends the sandboxes that servers
with -dev and files in FOLDER left behind when they ended. A server with -dev
starts this command; you do not need to run it.`
	c.example = "$ bivouac dev-cleanup ~/.cache/bivouac/dev"
	c.run = func(ctx context.Context, args []string) error {
		if _, err := io.Copy(io.Discard, c.in); err != nil {
			return err
		}
		return agent.EndAbandoned(ctx, args[0], time.Second)
	}
	return c
}
