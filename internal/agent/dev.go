package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/memory"
	"github.com/bivouac/bivouac/internal/process"
	"github.com/bivouac/bivouac/runtime"
)

// endLimit is how long the sandboxes of -dev may take to end together.
const endLimit = 10 * time.Second

// newDevBase needs no other program: records stand in memory, sandboxes are
// processes of this machine. Both end with the agent. What an agent at the same
// address left behind that was killed is ended first.
func newDevBase(ctx context.Context, c config.Config, log hclog.Logger) (base, error) {
	dir, err := devDir(c.HTTPAddr)
	if err != nil {
		return base{}, err
	}
	volume := filepath.Join(dir, "volume")
	if err := makeVolume(volume); err != nil {
		return base{}, fmt.Errorf("agent: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return base{}, fmt.Errorf("agent: find this program: %w", err)
	}
	driver, err := process.New(process.Config{
		Dir:     filepath.Join(dir, "sandboxes"),
		Command: []string{self, "demo-sandbox"},
		Logger:  log.Named("process"),
	})
	if err != nil {
		return base{}, fmt.Errorf("agent: %w", err)
	}
	if err := endAll(ctx, driver); err != nil {
		return base{}, errors.Join(fmt.Errorf("agent: end what an earlier agent left: %w", err), driver.Close())
	}
	store := memory.NewStore()
	return base{
		store:   store,
		locker:  memory.NewLocker(store),
		now:     time.Now,
		drivers: map[string]runtime.Driver{process.Name: driver},
		volume:  volume,
		parts: []part{{"sandboxes", func(ctx context.Context) error {
			<-ctx.Done()
			return errors.Join(endAll(context.WithoutCancel(ctx), driver), driver.Close())
		}}},
	}, nil
}

// devDir is the folder for what an agent at this address has to remember.
func devDir(addr string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("agent: a folder for -dev: %w", err)
	}
	return filepath.Join(cache, "bivouac", "dev", strings.NewReplacer(":", "_", "[", "", "]", "").Replace(addr)), nil
}

func makeVolume(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	const text = "This folder is the volume of the sandbox that bivouac agent -dev offers to make.\n"
	return os.WriteFile(filepath.Join(dir, "README"), []byte(text), 0o600)
}

// endAll deletes every sandbox of the driver.
func endAll(ctx context.Context, driver runtime.Driver) error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	var all errgroup.Group
	all.SetLimit(16)
	var listErr error
	for sandbox, err := range driver.List(ctx) {
		if err != nil {
			listErr = err
			break
		}
		all.Go(func() error { return driver.Delete(ctx, sandbox.SessionID) })
	}
	return errors.Join(listErr, all.Wait())
}

const guideText = `
Bivouac runs at {{.URL}}. Its sandboxes are processes of this machine.
Ctrl-C stops it and all of them. To try it out, in another terminal:

Give a chat its sandbox, with a folder of this machine as the volume:

  curl -sS -X PUT {{.URL}}/v1/sessions/{{.ChatID}} -H 'Content-Type: application/json' -d {{.Body}}

Look at the session:

  {{.Get}}

Look at the volume as the sandbox shows it, at the session's endpoint:

  curl -sS "http://$({{.Get}} | awk '$1 == "Endpoint" {print $2}')/workspace/README"

`

// guide prints what to do next, each line good to be typed as it is.
func guide(ctx context.Context, env Environment, addr, volume string) error {
	url := "http://" + addr
	chatID := uuid.NewString()
	body, err := json.Marshal(map[string]string{"agent_id": "demo", "volume_host_path": volume})
	if err != nil {
		return err
	}
	get := quote(env.Program) + " session get "
	if addr != config.Default().HTTPAddr {
		get += "-address=" + url + " "
	}
	text, err := template.New("guide").Parse(guideText)
	if err != nil {
		return err
	}
	if err := text.Execute(env.Stdout, map[string]string{
		"URL": url, "ChatID": chatID, "Body": quote(string(body)), "Get": get + chatID,
	}); err != nil {
		return fmt.Errorf("print what to do next: %w", err)
	}
	<-ctx.Done()
	return nil
}

// quote makes text one word for a shell.
func quote(text string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-"
	if text != "" && strings.Trim(text, plain) == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
