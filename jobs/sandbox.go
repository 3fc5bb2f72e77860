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
		MetaAgentID:   spec.AgentID,
		MetaInstance:  instance,
		MetaSpec:      Fingerprint(spec),
		MetaMainTasks: mainTasks(group),

		MetaVolumeHostPath: spec.VolumeHostPath,
		MetaCreatedAt:      spec.CreatedAt.UTC().Format(time.RFC3339Nano),
		MetaExpiresAt:      spec.ExpiresAt.UTC().Format(time.RFC3339Nano),
	})

	group.Count = new(1)
	group.RestartPolicy = noRestart()
	group.ReschedulePolicy = &api.ReschedulePolicy{Attempts: new(0), Unlimited: new(false)}
	group.Disconnect = &api.DisconnectStrategy{Replace: new(false), StopOnClientAfter: new(stopOnClientAfter)}
	for _, network := range group.Networks {
		splitPorts(network)
	}
	for _, task := range group.Tasks {
		setAll(&task.Env, map[string]string{
			"BIVOUAC_SESSION_ID": spec.SessionID,
			"BIVOUAC_CHAT_ID":    spec.ChatID,
			"BIVOUAC_AGENT_ID":   spec.AgentID,
			"BIVOUAC_WORKSPACE":  workspace,
		})
		if isMain(task) { // others must not take the port for theirs
			setAll(&task.Env, map[string]string{"PORT": "${NOMAD_PORT_" + t.ready.Port + "}"})
		}
	}
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
