// Package jobs turns a session into a Nomad job, by a job template.
//
// A template is an HCL file: variables, a ready check, and a job in Nomad's own
// jobspec syntax. What must hold for every sandbox, whatever the template says,
// is set here: the job's ID, its meta, its environment, and that Nomad neither
// restarts, nor reschedules, nor replaces it.
//
// The values of a session enter a job as data. They are never pasted into text
// that is parsed again, and Nomad finds nothing in them to interpolate: neither
// alone, nor together with the template's text beside them.
//
// The package is pure: the same session gives the same job. It must never talk
// to Nomad.
package jobs

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
	"github.com/zclconf/go-cty/cty"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/ready"
)

// IDPrefix begins the ID of every job of Bivouac; the session's ID follows.
const IDPrefix = "bivouac-"

// ID returns the job ID of a session.
func ID(sessionID string) string { return IDPrefix + sessionID }

// The keys of a job's meta by which Bivouac knows its own jobs.
const (
	MetaSessionID = "session_id"
	MetaChatID    = "chat_id"
	MetaAgentID   = "agent_id"
	MetaInstance  = "bivouac_instance"
	// What else a session's record holds, so that one that was lost can be
	// written again. Times are RFC 3339, in UTC.
	MetaVolumeHostPath = "volume_host_path"
	MetaCreatedAt      = "created_at"
	MetaExpiresAt      = "expires_at" // as planned at creation
	// MetaSpec is a fingerprint of the spec, see [Fingerprint].
	MetaSpec = "bivouac_spec"
	// MetaMainTasks names the main tasks, see [MainTasks].
	MetaMainTasks = "bivouac_main_tasks"
	// MetaTombstone marks a job that only takes up its ID.
	MetaTombstone = "bivouac_tombstone"
)

//go:embed templates/*.hcl
var embedded embed.FS

// maxTemplate bounds a template file, in bytes.
const maxTemplate = 1 << 20

// Template makes jobs. It is safe for concurrent use.
type Template struct {
	file      *file
	variables map[string]cty.Value
	ready     Ready
	sample    *api.Job // of a made-up session, for what does not depend on one
	openings  [4]int   // of the sample
}

// MaxReadyTimeout is the longest that a template may give a sandbox to become
// ready. A use case has 5 minutes: what takes longer would be cut off before it
// could say what it waited for.
const MaxReadyTimeout = 4 * time.Minute

// Ready says when a sandbox made from a template is ready.
type Ready struct {
	Port    string        // label of the port that is asked
	Check   ready.Check   // what counts as an answer
	Timeout time.Duration // from the job's registration, [MaxReadyTimeout] at most
}

// Load reads a template: one of those that [Names] lists, or else the file of
// that name. Variables are given as text and converted to what the template
// declares. All that can be wrong with a template is found here, with file and
// line.
func Load(nameOrPath string, variables map[string]string) (*Template, error) {
	name, src, err := read(nameOrPath)
	if err != nil {
		return nil, fmt.Errorf("job template %s: %w", nameOrPath, err)
	}
	return Parse(name, src, variables)
}

// Parse does as [Load] does, with a template's text; filename is for messages.
func Parse(filename string, src []byte, variables map[string]string) (*Template, error) {
	t, diags := parse(filename, src, variables)
	if diags.HasErrors() {
		return nil, fmt.Errorf("job template: %w", errors.Join(diags.Errs()...))
	}
	return t, nil
}

func parse(filename string, src []byte, variables map[string]string) (*Template, hcl.Diagnostics) {
	parsed, diags := hclsyntax.ParseConfig(src, filename, hcl.InitialPos)
	if diags.HasErrors() {
		return nil, firstOf(diags)
	}
	body, ok := parsed.Body.(*hclsyntax.Body)
	if !ok { // cannot be: that is what ParseConfig returns
		return nil, hcl.Diagnostics{problem(parsed.Body.MissingItemRange(), "Unknown syntax", "A template is HCL's native syntax.")}
	}
	f, diags := splitFile(body)
	if diags.HasErrors() {
		return nil, diags
	}
	nameAllForNomad(f.job.Body)
	if f.workspace != nil {
		nameForNomad(f.workspace.Expr)
	}
	values, diags := f.values(variables)
	if diags.HasErrors() {
		return nil, diags
	}
	t := &Template{file: f, variables: values}
	if t.ready, diags = t.decodeReady(); diags.HasErrors() {
		return nil, diags
	}
	// A job of a made-up session brings every mistake to light that any
	// session's job could have.
	if t.sample, diags = t.decodeJob(sampleSpec(), "sample"); diags.HasErrors() {
		return nil, diags
	}
	t.openings = openings(t.sample)
	if t.ready.Check.HTTPPath == "" && isPublished(t.sample.TaskGroups[0]) {
		t.ready.Check.StayOpen = ready.DockerStayOpen
	}
	if open := t.ready.Check.StayOpen; t.ready.Timeout <= open {
		return nil, hcl.Diagnostics{problem(f.ready.DefRange(), "Wrong ready check",
			"The timeout is %v, but behind Docker's proxy a connection counts only after %v: make it longer, or use type \"http\".", t.ready.Timeout, open)}
	}
	return t, nil
}

// isPublished says whether a container engine publishes the group's ports, which
// it may do by a proxy that listens before the container does. In a network of
// its own a group's ports lead straight to its tasks.
func isPublished(group *api.TaskGroup) bool {
	network := group.Networks[0].Mode
	return (network == "" || network == "host") && slices.ContainsFunc(group.Tasks, func(task *api.Task) bool {
		return task.Driver == "docker" || task.Driver == "podman"
	})
}

// maxSyntaxErrors is how many syntax errors of a template are told. One missing
// quotation mark turns all strings that follow inside out.
const maxSyntaxErrors = 3

// firstOf returns the first syntax errors by their place in the file, and says
// how many more there are.
func firstOf(diags hcl.Diagnostics) hcl.Diagnostics {
	start := func(d *hcl.Diagnostic) int {
		if d.Subject == nil {
			return 0
		}
		return d.Subject.Start.Byte
	}
	errs := slices.DeleteFunc(slices.Clone(diags), func(d *hcl.Diagnostic) bool { return d.Severity != hcl.DiagError })
	slices.SortStableFunc(errs, func(a, b *hcl.Diagnostic) int { return cmp.Compare(start(a), start(b)) })
	left := len(errs) - maxSyntaxErrors
	if left <= 0 {
		return errs
	}
	return append(errs[:maxSyntaxErrors:maxSyntaxErrors], &hcl.Diagnostic{
		Severity: hcl.DiagError,
		Subject:  errs[maxSyntaxErrors].Subject,
		Summary:  "More syntax errors",
		Detail:   fmt.Sprintf("There are %d more from here on, which may all follow from the first.", left),
	})
}

func read(nameOrPath string) (name string, src []byte, err error) {
	if slices.Contains(Names(), nameOrPath) {
		name = nameOrPath + ".hcl"
		src, err = embedded.ReadFile(path.Join("templates", name))
		return name, src, err
	}
	info, err := os.Stat(nameOrPath)
	if errors.Is(err, fs.ErrNotExist) && !strings.ContainsAny(nameOrPath, "/.") {
		return "", nil, fmt.Errorf("neither a file nor one of %s", strings.Join(Names(), ", "))
	}
	if err != nil {
		return "", nil, err
	}
	if info.Size() > maxTemplate {
		return "", nil, fmt.Errorf("larger than %d bytes", maxTemplate)
	}
	src, err = os.ReadFile(nameOrPath)
	return nameOrPath, src, err
}

// Names returns the embedded templates.
func Names() []string { return []string{"docker", "exec", "raw_exec"} }

// Job returns the job of spec's sandbox. instance names the replicas that work
// together. Its errors wrap [runtime.ErrInvalid].
func (t *Template) Job(spec runtime.Spec, instance string) (*api.Job, error) {
	if err := spec.Validate(); err != nil {
		return nil, fmt.Errorf("job: %w: %w", runtime.ErrInvalid, err)
	}
	job, diags := t.decodeJob(spec, instance)
	if diags.HasErrors() {
		return nil, fmt.Errorf("job: %w: %w", runtime.ErrInvalid, errors.Join(diags.Errs()...))
	}
	if openings(job) != t.openings {
		return nil, fmt.Errorf(`job: %w: the agent ID %q or the volume host path %q makes a "${" or "%%{" with the template's text beside it`,
			runtime.ErrInvalid, spec.AgentID, spec.VolumeHostPath)
	}
	return job, nil
}

// openings counts what Nomad's client and its drivers read as the beginning of a
// variable or a directive, or as its escape. A spec has none. So a job has those
// of its template, unless text of the spec and of the template make one together.
func openings(job *api.Job) [4]int {
	text, _ := json.Marshal(job) // nothing that came from HCL fails
	var counts [4]int
	for i, opening := range []string{"${", "%{", "$${", "%%{"} {
		counts[i] = bytes.Count(text, []byte(opening))
	}
	return counts
}

// Ready returns when a sandbox of this template is ready.
func (t *Template) Ready() Ready { return t.ready }

// Namespace returns the template's namespace, empty where it names none and so
// leaves it to the Nomad client's settings.
func (t *Template) Namespace() string {
	if t.sample.Namespace == nil {
		return ""
	}
	return *t.sample.Namespace
}

// Sample returns the job of a made-up session, which is the same as a real one's
// to whoever judges jobs. It must be neither changed nor run.
func (t *Template) Sample() *api.Job { return t.sample }

// Tombstone returns a stopped job that runs nothing and takes up the session's
// job ID, so that a first registration of that session that comes late fails.
func (t *Template) Tombstone(sessionID, instance string) *api.Job {
	group := t.sample.TaskGroups[0]
	task := api.NewTask("none", group.Tasks[0].Driver)
	task.Config = map[string]any{"command": "none", "image": "none"}
	return &api.Job{
		ID:          new(ID(sessionID)),
		Name:        new(ID(sessionID)),
		Type:        new(api.JobTypeBatch),
		Namespace:   t.sample.Namespace,
		NodePool:    t.sample.NodePool,
		Datacenters: t.sample.Datacenters,
		Stop:        new(true),
		Meta: map[string]string{
			MetaSessionID: sessionID,
			MetaInstance:  instance,
			MetaTombstone: "true",
		},
		TaskGroups: []*api.TaskGroup{{
			Name:          new("none"),
			Count:         new(0),
			Tasks:         []*api.Task{task},
			RestartPolicy: noRestart(),
		}},
	}
}
