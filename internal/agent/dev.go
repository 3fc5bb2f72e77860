package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/config"
	"github.com/bivouac/bivouac/internal/credentials"
	"github.com/bivouac/bivouac/internal/process"
	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/version"
	"github.com/bivouac/bivouac/runtime"
)

// newDevBase returns a base that needs no other program. Records are in memory, and
// sandboxes are processes on this machine. Both end with the server.
func newDevBase(c config.Config, log hclog.Logger) (base, error) {
	dir, err := devDir(c.HTTPAddrs[0])
	if err != nil {
		return base{}, err
	}
	volume, err := demoVolume(dir, c.VolumeRoots)
	if err != nil {
		return base{}, err
	}
	command, err := devCommand(c.JobVars)
	if err != nil {
		return base{}, err
	}
	driver, err := process.New(process.Config{
		Dir: filepath.Join(dir, sandboxFolder), Command: command, VolumeRoots: c.VolumeRoots, Logger: log.Named("process"),
	})
	if err != nil {
		return base{}, fmt.Errorf("agent: %w", err)
	}
	store := memory.NewStore()
	store.Retain(c.Events)
	host, err := os.Hostname()
	if err != nil {
		return base{}, fmt.Errorf("agent: %w", err)
	}
	self := wire.Replica{Name: host, Version: version.Get().Version, Addresses: c.HTTPAddrs, StartedAt: time.Now().Round(0).UTC()}
	b := base{
		store:      store,
		locker:     memory.NewLocker(store),
		now:        time.Now,
		drivers:    map[string]runtime.Driver{process.Name: driver},
		volume:     volume,
		identified: make(chan struct{}),

		credentials: map[string]credentials.Reloader{},
		instance:    func() string { return devInstance(c.HTTPAddrs[0]) },
		replicas:    func(context.Context) []wire.Replica { return []wire.Replica{self} },
		parts: []part{{"runtime process", func(ctx context.Context) error {
			<-ctx.Done()
			return driver.Close()
		}}},
	}
	close(b.identified)
	return b, nil
}

// devCommand returns the command that runs in each sandbox. It is the demo sandbox,
// unless the job variables command and args set another one, as in the raw_exec
// template.
func devCommand(variables map[string]string) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("agent: find this program: %w", err)
	}
	command, args := self, []string{"demo-sandbox"}
	if given, told := variables["command"]; told {
		command = given
	}
	if given, told := variables["args"]; told {
		args = nil
		if err := json.Unmarshal([]byte(given), &args); err != nil {
			return nil, fmt.Errorf(`agent: job_vars: args is %s, and must be a list such as ["-v", "serve"]: %w`, given, err)
		}
	}
	return append([]string{command}, args...), nil
}

// sandboxFolder is the process runtime's folder, inside its server's folder.
const sandboxFolder = "sandboxes"

// devRoot returns the folder of all -dev servers of this user.
func devRoot() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("agent: a folder for -dev: %w", err)
	}
	return filepath.Join(cache, "bivouac", "dev"), nil
}

// devDir returns the folder of the -dev server at this address.
func devDir(addr string) (string, error) {
	root, err := devRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, strings.NewReplacer(":", "_", "[", "", "]", "").Replace(addr)), nil
}

// makeDevDir creates the folder of devDir and its parents, so that only this user can
// write to them.
func makeDevDir(addr string) (string, error) {
	dir, err := devDir(addr)
	if err != nil {
		return "", err
	}
	root := filepath.Dir(dir)
	bivouac := filepath.Dir(root)
	err = os.MkdirAll(filepath.Dir(bivouac), 0o700)
	for _, own := range []string{bivouac, root, dir} {
		if err == nil {
			err = process.MakeFolder(own)
		}
	}
	if err != nil {
		return "", fmt.Errorf("agent: a folder for -dev: %w", err)
	}
	return dir, nil
}

// devInstance returns the instance ID that a -dev server passes to its drivers. A -dev
// server ends all sandboxes of its instance, so no other server on this machine may
// have the same ID.
func devInstance(addr string) string {
	return "dev-" + strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(addr, "-"), "-")
}

// devVolume is a folder to offer as a sandbox's volume. If none could be made, problem
// says why, and path only shows what a path looks like.
type devVolume struct {
	path    string
	problem error
}

// demoVolume makes a volume that the server's volume roots allow: in dir, or directly
// below the first root. If it cannot write to that root, the server still starts.
func demoVolume(dir string, roots []string) (devVolume, error) {
	if len(roots) > 0 {
		path := filepath.Join(roots[0], "bivouac-demo")
		problem := makeVolume(path)
		if problem != nil {
			path = filepath.Join(roots[0], "FOLDER")
		}
		return devVolume{path, problem}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return devVolume{}, fmt.Errorf("agent: a folder for -dev: %w", err)
	}
	path := filepath.Join(dir, "volume")
	if err := makeVolume(path); err != nil {
		return devVolume{}, fmt.Errorf("agent: a volume for -dev: %w", err)
	}
	return devVolume{path: path}, nil
}

// makeVolume creates a folder with a README. It keeps a folder or a README that exists.
func makeVolume(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir) // refuse a link: it could lead to another user's folder
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder", dir)
	}
	file, err := os.OpenFile(filepath.Join(dir, "README"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = file.WriteString("This folder is the volume of the sandbox that bivouac agent -dev offers to make.\n")
	return errors.Join(err, file.Close())
}

const guideText = `
Bivouac runs at {{.URL}}. Its sandboxes are processes of this machine.
Ctrl-C stops it and all of them. See its sessions at {{.URL}}/ui/ in a browser.
To try it out, in another terminal:
{{- with .Variables}}

First export {{.}}.
{{- end}}

Give a chat its sandbox, with a folder of this machine as the volume:
{{- with .Problem}}
There is none yet ({{.}}).
Put the name of one in place of FOLDER.
{{- end}}

  curl -sS{{.Options}} -X PUT {{.URL}}/v1/sessions/{{.ChatID}} -H 'Content-Type: application/json' -d {{.Body}}

Look at the session:

  {{.Get}}

Look at the volume as the sandbox shows it, at the session's endpoint:

  curl -sS "http://$({{.Get}} | awk '$1 == "Endpoint" {print $2}')/workspace/README"

`

// curlOptions returns the options with which curl meets what the server asks of callers,
// and the environment variables that they use. bivouac's own commands use these too.
func curlOptions(c config.Config) (options string, variables []string) {
	add := func(option, variable string) {
		options += " " + option + "$" + variable + `"`
		variables = append(variables, variable)
	}
	if c.Authenticates() {
		add(`-H "Authorization: Bearer `, "BIVOUAC_TOKEN")
	}
	if c.TLS.CertFile != "" {
		add(`--cacert "`, "BIVOUAC_CACERT")
	}
	if c.TLS.VerifyClient {
		add(`--cert "`, "BIVOUAC_CLIENT_CERT")
		add(`--key "`, "BIVOUAC_CLIENT_KEY")
	}
	return options, variables
}

// guide prints what to do next. Each command can be copied as it is.
func guide(env Environment, c config.Config, url string, volume devVolume) error {
	chatID := uuid.NewString()
	body, err := json.Marshal(map[string]string{"agent_id": "demo", "volume_host_path": volume.path})
	if err != nil {
		return err
	}
	get := quote(env.Program) + " session get "
	if url != "http://"+config.Default().HTTPAddrs[0] {
		get += "-address=" + url + " "
	}
	text, err := template.New("guide").Parse(guideText)
	if err != nil {
		return err
	}
	options, variables := curlOptions(c)
	if err := text.Execute(env.Stdout, map[string]any{
		"Options": options, "Variables": strings.Join(variables, ", "),
		"URL": url, "ChatID": chatID, "Body": quote(string(body)), "Get": get + chatID, "Problem": volume.problem,
	}); err != nil {
		return fmt.Errorf("print what to do next: %w", err)
	}
	return nil
}

// quote returns text as one word for a shell.
func quote(text string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-"
	if text != "" && strings.Trim(text, plain) == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
