package jobs

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/runtime"
)

// SessionFileEnv is the environment variable in which a spare finds the name of the file
// with its session, which appears at the claim.
const SessionFileEnv = "BIVOUAC_SESSION_FILE"

const (
	rawExec = "raw_exec"
	// sessionFolder is where the node helper puts the file, as the sandbox sees it.
	sessionFolder = "/run/bivouac"
	// rawExecFolder has a folder for each spare of raw_exec, which sees the node's files.
	rawExecFolder   = "/run/bivouac/sandboxes"
	sessionFileName = "session.json"
)

// helperDrivers are the task drivers that the node helper knows.
var helperDrivers = []string{"docker", "exec", rawExec}

// SpareTask is the task of a spare that gets the volume at the claim.
type SpareTask struct {
	Name      string
	Driver    string // docker, exec or raw_exec
	Workspace string // where the sandbox looks for its volume
}

// Spares returns nil if the template can make spares, and otherwise what to change so
// that it can.
func (t *Template) Spares() error { return t.noSpare }

// Variant returns a hash of everything that a spare is made from: the template's text
// and the values of its variables, as far as they matter to a spare. It is empty if the
// template cannot make spares.
func (t *Template) Variant() string {
	if t.noSpare != nil {
		return ""
	}
	text, err := json.Marshal(t.spare)
	if err != nil {
		panic(err) // nothing that came from HCL fails
	}
	hash := sha256.Sum256(text)
	return hex.EncodeToString(hash[:16])
}

// SpareTask returns the task of the session's spare that gets the volume at the claim:
// the first main task. The template must be able to make spares.
func (t *Template) SpareTask(sessionID string) SpareTask {
	spec := spareSpec(sessionID)
	main := mainTask(t.spare)
	return SpareTask{Name: main.Name, Driver: main.Driver, Workspace: t.newDecoder(spec).workspace(t, t.spare, spec)}
}

func spareSpec(sessionID string) runtime.Spec {
	return runtime.Spec{
		SessionID: sessionID,
		Pool:      "sample",
		CreatedAt: time.Unix(0, 0).UTC(),
		ExpiresAt: time.Unix(0, 0).UTC(),
	}
}

// decodeSpare makes the job of a made-up spare, or returns why the template cannot make
// spares.
func (t *Template) decodeSpare() (*api.Job, error) {
	job, diags := t.decodeJob(spareSpec(sampleSpec().SessionID), "sample")
	err := errors.Join(diags.Errs()...)
	if !diags.HasErrors() {
		err = t.checkSpare(mainTask(job))
	}
	if err != nil {
		return nil, fmt.Errorf("the template cannot make spares for a pool: %w", err)
	}
	return job, nil
}

// checkSpare returns why the node helper cannot give a volume to the main task of a spare.
func (t *Template) checkSpare(main *api.Task) error {
	if !slices.Contains(helperDrivers, main.Driver) {
		return fmt.Errorf("task %q has the driver %q, but the node helper knows only %s", main.Name, main.Driver, strings.Join(helperDrivers, ", "))
	}
	if engine, ok := main.Config["runtime"]; ok && engine != "runc" {
		return fmt.Errorf("task %q has the container runtime %q, but the node helper can mount only in containers of runc", main.Name, engine)
	}
	for _, task := range t.sample.TaskGroups[0].Tasks {
		if task.Name != main.Name && usesVolume(task) {
			return fmt.Errorf("task %q uses session.volume_host_path, but at a claim only task %q gets the volume", task.Name, main.Name)
		}
	}
	return nil
}

// usesVolume reports whether the template gives the sample's volume to the task.
func usesVolume(task *api.Task) bool {
	for name, value := range task.Env {
		if name != "BIVOUAC_WORKSPACE" && strings.Contains(value, sampleVolume) {
			return true
		}
	}
	text, _ := json.Marshal(task.Config) // nothing that came from HCL fails
	return strings.Contains(string(text), sampleVolume)
}

// workspace returns where the sandbox finds its volume. A spare of raw_exec finds a
// symbolic link there, in a folder that the node helper makes at the claim.
func (d *decoder) workspace(t *Template, job *api.Job, spec runtime.Spec) string {
	if main := mainTask(job); spec.Pool != "" && main != nil && main.Driver == rawExec {
		return path.Join(rawExecFolder, spec.SessionID, "workspace")
	}
	workspace := "/workspace"
	if attr := t.file.workspace; attr != nil {
		d.value(attr.Expr, reflect.ValueOf(&workspace).Elem(), true)
	}
	return workspace
}

// sessionFile returns the name of the file with the session of a claimed spare, as its
// main task sees it.
func sessionFile(main *api.Task, sessionID string) string {
	if main.Driver == rawExec {
		return path.Join(rawExecFolder, sessionID, sessionFileName)
	}
	return path.Join(sessionFolder, sessionFileName)
}

// mainTask returns the job's first main task, or nil if it has none.
func mainTask(job *api.Job) *api.Task {
	for _, group := range job.TaskGroups {
		if i := slices.IndexFunc(group.Tasks, isMain); i >= 0 {
			return group.Tasks[i]
		}
	}
	return nil
}
