// Package jobs turns a session into a Nomad job with a job template.
//
// A template is an HCL file with variables, a ready check and a job in Nomad's
// jobspec syntax. [Load] reads one, and [Template.Job] makes a session's job. For
// every job the package sets the job's ID, meta and environment, whatever the
// template contains, and keeps Nomad from restarting, rescheduling or replacing
// it. A session's values enter the job as data: they are never parsed again, and
// Nomad's interpolation leaves them unchanged.
//
// The package does not talk to Nomad. The same session always gives the same
// job.
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

// IDPrefix is the prefix of the ID of every Bivouac job. The session ID follows it.
const IDPrefix = "bivouac-"

// ID returns the job ID of a session.
func ID(sessionID string) string { return IDPrefix + sessionID }

// The meta keys of Bivouac's jobs.
const (
	MetaSessionID = "session_id"
	MetaChatID    = "chat_id"
	MetaAgentID   = "agent_id"
	MetaInstance  = "bivouac_instance"
	// These hold the rest of the session's record, so that a lost record can be
	// written again. Times are RFC 3339 in UTC.
	MetaVolumeHostPath = "volume_host_path"
	MetaCreatedAt      = "created_at"
	MetaExpiresAt      = "expires_at" // as planned at creation
	// MetaDescription is the session's owner and labels, as JSON.
	MetaDescription = "bivouac_description"
	// MetaSpec is the spec's [Fingerprint].
	MetaSpec = "bivouac_spec"
	// MetaPool is the pool of a spare. The job of a spare has no chat, AI agent or volume
	// in its meta, even after the claim: Nomad would replace the sandbox if they were added.
	MetaPool = "bivouac_pool"
	// MetaMainTasks holds the names of the main tasks; see [MainTasks].
	MetaMainTasks = "bivouac_main_tasks"
	// MetaTombstone marks a job that only occupies its ID; see [Template.Tombstone].
	MetaTombstone = "bivouac_tombstone"
)

//go:embed templates/*.hcl
var embedded embed.FS

// maxTemplate bounds a template file, in bytes.
const maxTemplate = 1 << 20

// Template makes the jobs of sessions. It is safe for concurrent use.
type Template struct {
	file      *file
	variables map[string]cty.Value
	ready     Ready
	sample    *api.Job // of a made-up session, for what does not depend on one
	openings  [4]int   // of the sample
	spare     *api.Job // of a made-up spare; nil if the template cannot make spares
	noSpare   error    // why it cannot
}

// MaxReadyTimeout is the longest ready timeout that a template may set. A use
// case has 5 minutes in all, so a longer wait would be cut off before it could
// report what it waited for.
const MaxReadyTimeout = 4 * time.Minute

// Ready defines when a sandbox made from a template is ready.
type Ready struct {
	Port    string        // label of the port to check
	Check   ready.Check   // what counts as an answer
	Timeout time.Duration // from the job's registration, [MaxReadyTimeout] at most
}

// Load reads a template: one that [Names] lists, or else the file with that
// path. Variables are given as text and converted to the types that the template
// declares. Load finds everything that can be wrong with a template, and its
// errors name the file and line.
func Load(nameOrPath string, variables map[string]string) (*Template, error) {
	name, src, err := read(nameOrPath)
	if err != nil {
		return nil, fmt.Errorf("job template %s: %w", nameOrPath, err)
	}
	return Parse(name, src, variables)
}

// Parse is like [Load], but takes the template's text. filename is used in
// error messages only.
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
	if !ok { // never: ParseConfig returns this type
		return nil, hcl.Diagnostics{problem(parsed.Body.MissingItemRange(), "Unknown syntax", "A template must use HCL's native syntax.")}
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
	// The job of a made-up session shows every mistake that the job of any
	// session could have.
	if t.sample, diags = t.decodeJob(sampleSpec(), "sample"); diags.HasErrors() {
		return nil, diags
	}
	t.openings = openings(t.sample)
	t.spare, t.noSpare = t.decodeSpare()
	if t.ready.Check.HTTPPath == "" && isPublished(t.sample.TaskGroups[0]) {
		t.ready.Check.StayOpen = ready.DockerStayOpen
	}
	if open := t.ready.Check.StayOpen; t.ready.Timeout <= open {
		return nil, hcl.Diagnostics{problem(f.ready.DefRange(), "Wrong ready check",
			"The timeout is %v, but behind Docker's proxy a connection counts only after it stayed open for %v: set a longer timeout, or use type \"http\".", t.ready.Timeout, open)}
	}
	return t, nil
}

// isPublished reports whether a container engine publishes the group's ports. It
// may use a proxy for that, which listens before the container does. If the group
// has its own network, its ports lead straight to its tasks.
func isPublished(group *api.TaskGroup) bool {
	network := group.Networks[0].Mode
	return (network == "" || network == "host") && slices.ContainsFunc(group.Tasks, func(task *api.Task) bool {
		return task.Driver == "docker" || task.Driver == "podman"
	})
}

// maxSyntaxErrors is how many syntax errors of a template are reported. One
// missing quotation mark can cause an error in every string that follows.
const maxSyntaxErrors = 3

// firstOf returns the first syntax errors in the order of the file, followed by
// one that counts the rest.
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
		Detail:   fmt.Sprintf("There are %d more from here on; the first may have caused them all.", left),
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
		return "", nil, fmt.Errorf("no such file or embedded template (available: %s)", strings.Join(Names(), ", "))
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

// Names returns the names of the embedded templates.
func Names() []string { return []string{"docker", "exec", "raw_exec"} }

// Job returns the job of spec's sandbox. instance is the ID of the Bivouac
// instance: the replicas that work together. Its errors wrap [runtime.ErrInvalid].
func (t *Template) Job(spec runtime.Spec, instance string) (*api.Job, error) {
	if err := spec.Validate(); err != nil {
		return nil, fmt.Errorf("job: %w: %w", runtime.ErrInvalid, err)
	}
	if spec.Pool != "" && t.noSpare != nil {
		return nil, fmt.Errorf("job: %w: %w", runtime.ErrInvalid, t.noSpare)
	}
	job, diags := t.decodeJob(spec, instance)
	if diags.HasErrors() {
		return nil, fmt.Errorf("job: %w: %w", runtime.ErrInvalid, errors.Join(diags.Errs()...))
	}
	if spec.Pool == "" && openings(job) != t.openings { // a spare has no free text
		return nil, fmt.Errorf(`job: %w: the agent ID %q or the volume host path %q makes a "${" or "%%{" with the template's text beside it`,
			runtime.ErrInvalid, spec.AgentID, spec.VolumeHostPath)
	}
	return job, nil
}

// openings counts what the Nomad client and its task drivers read as the beginning
// of a variable or a directive, or as its escape. A spec has none, so a job has
// exactly those of its template unless text of both together makes another one.
func openings(job *api.Job) [4]int {
	text, _ := json.Marshal(job) // nothing that came from HCL fails
	var counts [4]int
	for i, opening := range []string{"${", "%{", "$${", "%%{"} {
		counts[i] = bytes.Count(text, []byte(opening))
	}
	return counts
}

// Ready returns the template's ready check.
func (t *Template) Ready() Ready { return t.ready }

// Namespace returns the template's namespace. It is empty if the template sets
// none; then the settings of the Nomad API client apply.
func (t *Template) Namespace() string {
	if t.sample.Namespace == nil {
		return ""
	}
	return *t.sample.Namespace
}

// Sample returns the job of a made-up session, to check whether Nomad would accept
// a real one. Callers must not change or run it.
func (t *Template) Sample() *api.Job { return t.sample }

// Tombstone returns a stopped job that runs nothing and occupies the session's
// job ID, so that a late first registration of that session fails.
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
