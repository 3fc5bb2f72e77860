package jobs

import (
	"maps"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/runtime"
)

// stopOnClientAfter is how long a client that lost its servers lets a sandbox
// run on. Together with "replace = false" it keeps Nomad from starting a second
// one elsewhere when the node is lost, whatever its length. It does not keep
// later evaluations of the job from that, of which one comes after this time
// where the servers never saw the first one run: the driver stops the job of an
// allocation that was given up.
//
// A client counts from its last heartbeat, and a healthy one sends the next only
// after 10 to 20 s, and later in a large cluster. So it must be well above that:
// a shorter time ends sandboxes of which nothing is wrong. 5 minutes is also what
// new leaders give clients to find them (failover_heartbeat_ttl).
const stopOnClientAfter = 5 * time.Minute

// force sets what holds for every sandbox's job.
func (d *decoder) force(t *Template, job *api.Job, spec runtime.Spec, instance, workspace string) {
	job.ID = new(ID(spec.SessionID))
	if job.Name == nil {
		job.Name = job.ID
	}
	job.Type = new(api.JobTypeBatch)
	group := job.TaskGroups[0]
	setAll(&job.Meta, map[string]string{
		MetaSessionID: spec.SessionID,
		MetaChatID:    spec.ChatID,
		MetaAgentID:   d.protect(spec.AgentID),
		MetaInstance:  instance,
		MetaSpec:      Fingerprint(spec),
		MetaMainTasks: mainTasks(group),

		MetaVolumeHostPath: d.protect(spec.VolumeHostPath),
		MetaCreatedAt:      spec.CreatedAt.UTC().Format(time.RFC3339Nano),
		MetaExpiresAt:      spec.ExpiresAt.UTC().Format(time.RFC3339Nano),
	})

	group.Count = new(1)
	group.RestartPolicy = noRestart()
	group.ReschedulePolicy = &api.ReschedulePolicy{Attempts: new(0), Unlimited: new(false)}
	group.Disconnect = &api.DisconnectStrategy{Replace: new(false), StopOnClientAfter: new(stopOnClientAfter)} // safeguard: disconnect block
	for _, network := range group.Networks {
		splitPorts(network)
	}
	for _, task := range group.Tasks {
		setAll(&task.Env, map[string]string{
			"BIVOUAC_SESSION_ID": spec.SessionID,
			"BIVOUAC_CHAT_ID":    spec.ChatID,
			"BIVOUAC_AGENT_ID":   d.protect(spec.AgentID),
			"BIVOUAC_WORKSPACE":  workspace,
		})
		if isMain(task) { // others must not take the port for theirs
			setAll(&task.Env, map[string]string{"PORT": "${NOMAD_PORT_" + t.ready.Port + "}"})
		}
	}

	for _, task := range group.Tasks {
		exportMeta(task, job.Meta, group.Meta, task.Meta)
	}
	restoreMeta(job.Meta)
	restoreMeta(group.Meta)
	for _, task := range group.Tasks {
		restoreMeta(task.Meta)
	}
	maps.Copy(job.Meta, d.inUse)
}

// mainTaskSeparator stands between names: Nomad allows no task to have it in its
// name.
const mainTaskSeparator = "/"

// mainTasks lists the group's main tasks for the job's meta.
func mainTasks(group *api.TaskGroup) string {
	var names []string
	for _, task := range group.Tasks {
		if isMain(task) {
			names = append(names, task.Name)
		}
	}
	return strings.Join(names, mainTaskSeparator)
}

// MainTasks returns the names of a job's main tasks, those without a lifecycle
// block, by its meta. Lists and events of Nomad tell a job's meta, but not which
// tasks of an allocation are the main ones. A job that an older Bivouac made
// does not name them: then it returns none.
func MainTasks(meta map[string]string) []string {
	if meta[MetaMainTasks] == "" {
		return nil
	}
	return strings.Split(meta[MetaMainTasks], mainTaskSeparator)
}

// protect returns a session's value in the form in which a job carries it.
func (d *decoder) protect(value string) string {
	text := protected(standIn(value))
	d.noteReferences(text)
	return text
}

// exportMeta makes a task's NOMAD_META_… what the meta says, where that holds
// protected values: Nomad interpolates meta in no fixed order, so that there a
// reference to other meta may come too early, but it interpolates env after it.
func exportMeta(task *api.Task, levels ...map[string]string) {
	merged := make(map[string]string)
	for _, meta := range levels {
		maps.Copy(merged, meta)
	}
	env := make(map[string]string)
	for key, value := range merged {
		if strings.Contains(value, dollarRef) {
			env["NOMAD_META_"+key] = value
			env["NOMAD_META_"+strings.ToUpper(key)] = value
		}
	}
	if len(env) > 0 {
		setAll(&task.Env, env)
	}
}

// restoreMeta makes meta readable again for those who read the job.
func restoreMeta(meta map[string]string) {
	plain := strings.NewReplacer(dollarRef, "$", percentRef, "%")
	for key, value := range meta {
		meta[key] = plain.Replace(value)
	}
}

func setAll(target *map[string]string, values map[string]string) {
	if *target == nil {
		*target = make(map[string]string)
	}
	maps.Copy(*target, values)
}

func noRestart() *api.RestartPolicy {
	return &api.RestartPolicy{Attempts: new(0), Mode: new(api.RestartPolicyModeFail)}
}

// splitPorts sorts a network's ports as the API has them: those with a fixed
// number apart.
func splitPorts(network *api.NetworkResource) {
	ports := network.DynamicPorts
	network.DynamicPorts = nil
	for _, port := range ports {
		if port.Value > 0 {
			network.ReservedPorts = append(network.ReservedPorts, port)
		} else {
			network.DynamicPorts = append(network.DynamicPorts, port)
		}
	}
}
