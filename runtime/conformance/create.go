package conformance

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/runtime"
)

var stages = []runtime.Stage{runtime.StagePlaced, runtime.StageStarted, runtime.StageReady}

func saysWhoItIs(f *fixture) {
	info, err := f.driver.Info(f.patience())
	must.NoError(f, err)
	must.RegexMatch(f, regexp.MustCompile(`^[a-z0-9-]{1,64}$`), info.Name)
	must.LessEq(f, 64, len(info.Version))
}

func createsASandbox(f *fixture) {
	spec := f.spec()
	var reached []runtime.Stage
	sandbox, err := f.driver.Create(f.patience(), spec, func(s runtime.Stage) { reached = append(reached, s) })
	must.NoError(f, err)

	f.runs(spec, sandbox)
	// The stages that are told are told once each, in their order.
	inOrder := slices.DeleteFunc(slices.Clone(stages), func(s runtime.Stage) bool { return !slices.Contains(reached, s) })
	must.Eq(f, inOrder, reached)
	// All ways to look at it show the same.
	must.Eq(f, sandbox, f.inspect(spec))
	must.Eq(f, map[string]runtime.Sandbox{spec.SessionID: sandbox}, f.listed(spec))
}

func createsOnce(f *fixture) {
	spec := f.spec()
	first := f.create(spec)
	second := f.create(spec)
	must.Eq(f, first, second)
	f.runs(spec, second)
}

func refusesAnotherSpec(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	for name, change := range map[string]func(*runtime.Spec){
		"chat":   func(s *runtime.Spec) { s.ChatID = uuid.NewString() },
		"agent":  func(s *runtime.Spec) { s.AgentID = "agent-2" },
		"volume": func(s *runtime.Spec) { s.VolumeHostPath = f.volume() },
	} {
		other := spec
		change(&other)
		_, err := f.driver.Create(f.patience(), other, ignore)
		must.ErrorIs(f, err, runtime.ErrConflict, must.Sprintf("another %s", name))
	}
	f.runs(spec, sandbox)
}

func createsMany(f *fixture) {
	const many = 8
	specs := make([]runtime.Spec, many)
	sandboxes := make([]runtime.Sandbox, many)
	errs := make([]error, many)
	ctx := f.patience()
	var all sync.WaitGroup
	for i := range many {
		specs[i] = f.spec()
		all.Go(func() { sandboxes[i], errs[i] = f.driver.Create(ctx, specs[i], ignore) })
	}
	all.Wait()

	endpoints, containers := map[runtime.Endpoint]bool{}, map[string]bool{}
	for i, sandbox := range sandboxes {
		must.NoError(f, errs[i])
		f.runs(specs[i], sandbox)
		endpoints[sandbox.Endpoint], containers[sandbox.ContainerID] = true, true
	}
	must.MapLen(f, many, endpoints)
	must.MapLen(f, many, containers)
	must.MapLen(f, many, f.listed(specs...))

	for i := range many {
		all.Go(func() { errs[i] = f.driver.Delete(ctx, specs[i].SessionID) })
	}
	all.Wait()
	for i := range many {
		must.NoError(f, errs[i])
	}
	must.MapEmpty(f, f.listed(specs...))
}

// carriesOddNames: what a spec may hold by its rules reaches the sandbox as it
// is, whatever it means to a shell, a template or a mount option.
func carriesOddNames(f *fixture) {
	for _, name := range []string{
		`two words`, ` edges `, `tab-free, comma`, `a:b:ro`, `it's "quoted"`, `back\slash`, `$HOME`, `$$`, `$(id)`, "`id`",
		`%{ if true }`, `{{ .Name }}`, `semi;colon&and|pipe`, `-v`, `--flag=x`, `#hash`, `*?[a-z]`, `snow☃man`, `日本語`, `=equals=`,
	} {
		f.sub(name, func(sub *fixture) {
			spec := sub.spec()
			spec.AgentID = name
			spec.VolumeHostPath = filepath.Join(spec.VolumeHostPath, name)
			must.NoError(sub, os.Mkdir(spec.VolumeHostPath, 0o755))
			sandbox := sub.create(spec)
			sub.runs(spec, sandbox)
			sub.delete(spec)
			sub.isGone(spec)
		})
	}
}

// wasToldTruth asks a demo sandbox whom it serves, and for a file of the volume.
func (f *fixture) wasToldTruth(spec runtime.Spec, sandbox runtime.Sandbox) {
	f.Helper()
	var told struct {
		SessionID string `json:"session_id"`
		ChatID    string `json:"chat_id"`
		AgentID   string `json:"agent_id"`
	}
	must.NoError(f, json.Unmarshal(f.ask(sandbox, "/"), &told))
	must.Eq(f, spec.SessionID, told.SessionID)
	must.Eq(f, spec.ChatID, told.ChatID)
	must.Eq(f, spec.AgentID, told.AgentID)

	const name = "from the host.txt"
	must.NoError(f, os.WriteFile(filepath.Join(spec.VolumeHostPath, name), []byte(spec.SessionID), 0o644))
	must.Eq(f, spec.SessionID, string(f.ask(sandbox, "/workspace/"+url.PathEscape(name))))
}

func (f *fixture) ask(sandbox runtime.Sandbox, path string) []byte {
	f.Helper()
	request, err := http.NewRequestWithContext(f.patience(), http.MethodGet, "http://"+sandbox.Endpoint.AddrPort().String()+path, nil)
	must.NoError(f, err)
	response, err := http.DefaultClient.Do(request)
	must.NoError(f, err)
	body, err := io.ReadAll(response.Body)
	must.NoError(f, err)
	must.NoError(f, response.Body.Close())
	must.Eq(f, http.StatusOK, response.StatusCode)
	return body
}

// leavesNothingOfTheGivenUp: whoever waits for a create may give it up at any
// stage, and a delete then leaves nothing.
func leavesNothingOfTheGivenUp(f *fixture) {
	f.sub("before it began", func(sub *fixture) {
		ctx, cancel := context.WithCancel(sub.patience())
		cancel()
		sub.givesUp(ctx, ignore)
	})
	for _, stage := range stages {
		f.sub(string(stage), func(sub *fixture) {
			ctx, cancel := context.WithCancel(sub.patience())
			defer cancel()
			sub.givesUp(ctx, func(reached runtime.Stage) {
				if reached == stage {
					cancel()
				}
			})
		})
	}
}

func (f *fixture) givesUp(ctx context.Context, progress func(runtime.Stage)) {
	f.Helper()
	spec := f.spec()
	// It may also have been quicker.
	if _, err := f.driver.Create(ctx, spec, progress); err != nil {
		must.ErrorIs(f, err, context.Canceled)
	}
	f.delete(spec)
	f.isGone(spec)
	f.refusesCreate(spec)
}
