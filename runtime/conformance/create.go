package conformance

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/runtime"
)

var stages = []runtime.Stage{runtime.StagePlaced, runtime.StageStarted, runtime.StageReady}

func saysWhoItIs(f *fixture) {
	info, err := f.driver.Info(f.patience())
	f.noError(err, "Info")
	f.require(runtime.ValidName(info.Name), "its name is %q", info.Name)
	f.require(len(info.Version) <= 64, "its version has %d bytes", len(info.Version))
}

func createsASandbox(f *fixture) {
	spec := f.spec()
	var reached []runtime.Stage
	sandbox, err := f.driver.Create(f.patience(), spec, func(s runtime.Stage) { reached = append(reached, s) })
	f.noError(err, "Create")

	f.runs(spec, sandbox)
	// A driver may skip stages, but it reports each at most once and in order.
	inOrder := slices.DeleteFunc(slices.Clone(stages), func(s runtime.Stage) bool { return !slices.Contains(reached, s) })
	f.require(slices.Equal(inOrder, reached), "the stages came as %q", reached)
	same(f, sandbox, f.inspect(spec), "what Inspect shows")
	same(f, sandbox, f.listed(spec)[spec.SessionID], "what List shows")
}

// handsOverTheToken sends a wrong token, and then the right one. A sandbox without a
// token refuses neither, and one with a wrong token refuses both.
func handsOverTheToken(f *fixture) {
	spec := f.spec()
	sandbox := f.create(spec)
	status, _, err := f.send(http.MethodGet, sandbox, "/", "", newAccessToken())
	f.noError(err, "ask the sandbox")
	same(f, http.StatusUnauthorized, status, "the status of the sandbox's answer to a wrong token")
	f.ask(spec, sandbox, "/")
}

func createsOnce(f *fixture) {
	spec := f.spec()
	first := f.create(spec)
	second := f.create(spec)
	same(f, first, second, "what a repeated Create returns")
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
		f.isError(err, runtime.ErrConflict, "Create with another "+name)
	}
	f.runs(spec, sandbox)
}

func createsMany(f *fixture) {
	const many = 8
	specs := make([]runtime.Spec, many)
	sandboxes := make([]runtime.Sandbox, many)
	errs := make([]error, many)
	ctx := f.patience()
	for i := range many {
		specs[i] = f.spec()
	}
	var all sync.WaitGroup
	for i := range many {
		all.Go(func() { sandboxes[i], errs[i] = f.driver.Create(ctx, specs[i], ignore) })
	}
	all.Wait()

	endpoints, containers := map[runtime.Endpoint]bool{}, map[string]bool{}
	for i, sandbox := range sandboxes {
		f.noError(errs[i], "Create beside others")
		f.runs(specs[i], sandbox)
		endpoints[sandbox.Endpoint], containers[sandbox.ContainerID] = true, true
	}
	same(f, many, len(endpoints), "different endpoints")
	same(f, many, len(containers), "different containers")
	same(f, many, len(f.listed(specs...)), "sandboxes listed")

	for i := range many {
		all.Go(func() { errs[i] = f.driver.Delete(ctx, specs[i].SessionID) })
	}
	all.Wait()
	for i := range many {
		f.noError(errs[i], "Delete beside others")
	}
	same(f, 0, len(f.listed(specs...)), "sandboxes listed after their Deletes")
}

// inspectsTheStarting inspects at each stage. Inspect is the only call that the
// host makes during a Create of the same session.
func inspectsTheStarting(f *fixture) {
	spec := f.spec()
	type look struct {
		sandbox runtime.Sandbox
		err     error
	}
	ctx := f.patience()
	var (
		looking sync.WaitGroup
		mu      sync.Mutex
		looks   []look
	)
	sandbox, err := f.driver.Create(ctx, spec, func(runtime.Stage) {
		looking.Go(func() {
			sandbox, err := f.driver.Inspect(ctx, spec.SessionID)
			mu.Lock()
			defer mu.Unlock()
			looks = append(looks, look{sandbox, err})
		})
	})
	looking.Wait()
	f.noError(err, "Create")
	for _, seen := range looks {
		if errors.Is(seen.err, runtime.ErrNotFound) {
			continue // too early
		}
		f.noError(seen.err, "Inspect during a Create")
		same(f, spec.SessionID, seen.sandbox.SessionID, "the session that Inspect shows during a Create")
		f.require(seen.sandbox.State == runtime.StateStarting || seen.sandbox.State == runtime.StateRunning,
			"Inspect during a Create says %s", seen.sandbox.State)
	}
	f.runs(spec, sandbox)
}

// carriesOddNames checks that every name that a spec allows reaches the sandbox
// unchanged, whatever it means to a shell, a template or a mount option.
func carriesOddNames(f *fixture) {
	for _, name := range []string{
		`two words`, ` edges `, `tab-free, comma`, `a:b:ro`, `it's "quoted"`, `back\slash`, `$HOME`, `$$`, `$(id)`, "`id`",
		`{ if true }`, `100%`, `{{ .Name }}`, `semi;colon&and|pipe`, `-v`, `--flag=x`, `#hash`, `*?[a-z]`, `snow☃man`, `日本語`, `=equals=`,
	} {
		f.sub(name, func(sub *fixture) {
			spec := sub.spec()
			spec.AgentID = name
			spec.VolumeHostPath = filepath.Join(spec.VolumeHostPath, name)
			sub.works(spec)
		})
	}
}

// takesLongNames checks names of the maximum length, and a long path that Linux
// still accepts.
func takesLongNames(f *fixture) {
	spec := f.spec()
	spec.AgentID = strings.Repeat("é", 128)
	for room := 1000 - len(spec.VolumeHostPath); room > 1; room = 1000 - len(spec.VolumeHostPath) {
		spec.VolumeHostPath = filepath.Join(spec.VolumeHostPath, strings.Repeat("p", min(room-1, 255)))
	}
	f.works(spec)
}

// works takes a spec through the life of a sandbox. It creates the spec's
// volume first.
func (f *fixture) works(spec runtime.Spec) {
	f.noError(os.MkdirAll(spec.VolumeHostPath, 0o755), "make a volume")
	f.giveOrder(spec)
	sandbox := f.create(spec)
	f.runs(spec, sandbox)
	f.delete(spec)
	f.isGone(spec)
}
