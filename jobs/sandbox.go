package jobs

import (
	"maps"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/runtime"
)

// stopOnClientAfter is how long a Nomad client that lost its servers lets a
// sandbox run on. Together with "replace = false" it keeps Nomad from starting a
// second sandbox elsewhere when a node is lost. Any length does that. It does not
// keep later evaluations of the job from placing one. If the servers never saw the
// first allocation run, such an evaluation comes after this time. So the driver
// stops the job of an allocation that Nomad gave up.
//
// The client counts from its last heartbeat. A healthy client sends the next one
// after 10 to 20 s, and later in a large cluster. A value that is not well above
// that would end healthy sandboxes. 5 minutes is also the time that a new leader
// gives clients to find it (failover_heartbeat_ttl).
const stopOnClientAfter = 5 * time.Minute

// AccessTokenEnv is the environment variable in which a sandbox finds its access token.
const AccessTokenEnv = "BIVOUAC_ACCESS_TOKEN" //nolint:gosec // the name of a variable

// force sets what every sandbox's job must have.
func (d *decoder) force(t *Template, job *api.Job, spec runtime.Spec, instance, workspace string) {
	job.ID = new(ID(spec.SessionID))
	if job.Name == nil {
		job.Name = job.ID
	}
	job.Type = new(api.JobTypeBatch)
	group := job.TaskGroups[0]
	env := map[string]string{"BIVOUAC_CHAT_ID": spec.ChatID, "BIVOUAC_AGENT_ID": spec.AgentID}
	if spec.Pool != "" {
		env = map[string]string{SessionFileEnv: sessionFile(mainTask(job), spec.SessionID)}
	}
	setAll(&job.Meta, MetaOf(spec))
	setAll(&job.Meta, map[string]string{MetaInstance: instance, MetaMainTasks: mainTasks(group)})

	group.Count = new(1)
	group.RestartPolicy = noRestart()
	group.ReschedulePolicy = &api.ReschedulePolicy{Attempts: new(0), Unlimited: new(false)}
	group.Disconnect = &api.DisconnectStrategy{Replace: new(false), StopOnClientAfter: new(stopOnClientAfter)} // safeguard: disconnect block
	for _, network := range group.Networks {
		splitPorts(network)
	}
	for _, task := range group.Tasks {
		setAll(&task.Env, env)
		setAll(&task.Env, map[string]string{
			"BIVOUAC_SESSION_ID": spec.SessionID,
			"BIVOUAC_WORKSPACE":  workspace,
		})
		if isMain(task) { // other tasks must not listen on the port
			setAll(&task.Env, map[string]string{
				"PORT":         "${NOMAD_PORT_" + t.ready.Port + "}",
				AccessTokenEnv: string(spec.AccessToken), // not in meta, which Nomad's lists contain
			})
		}
	}
}

// mainTaskSeparator separates task names. Nomad does not allow it in a task name.
const mainTaskSeparator = "/"

// mainTasks returns the names of the group's main tasks for the job's meta.
func mainTasks(group *api.TaskGroup) string {
	var names []string
	for _, task := range group.Tasks {
		if isMain(task) {
			names = append(names, task.Name)
		}
	}
	return strings.Join(names, mainTaskSeparator)
}

// MainTasks returns the names of a job's main tasks from its meta. Main tasks are
// those without a lifecycle block. Nomad's lists and events contain a job's meta,
// but do not show which tasks of an allocation are main tasks. MainTasks returns
// nil for the job of an older Bivouac, which does not name them.
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

// splitPorts moves ports with a fixed number to ReservedPorts, as Nomad's API
// expects.
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
