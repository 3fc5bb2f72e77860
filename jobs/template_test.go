package jobs_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/jobs"
)

// around puts lines into an otherwise valid template. Of each place the first
// line is the one that follows the word.
func around(top, job, group, task string) string {
	return strings.Join([]string{
		`ready { port = "http" }`, // line 1
		top,                       // line 2
		`job {`,
		job, // line 4
		`group "g" {`,
		group, // line 6
		`network {`,
		`port "http" {}`,
		`}`,
		`task "t" {`,
		`driver = "docker"`,
		task, // line 12
		`}`,
		`}`,
		`}`,
	}, "\n")
}

func parse(t *testing.T, src string) *api.Job {
	t.Helper()
	template, err := jobs.Parse("test.hcl", []byte(src), nil)
	must.NoError(t, err)
	return jobOf(t, template, spec())
}

const jobspec = `
	ready { port = "http" }
	job {
		name        = "my sandbox"
		namespace   = "agents"
		node_pool   = "sandboxes"
		priority    = 70
		datacenters = ["dc1", "dc2"]
		meta = { "dotted.key" = "v" }
		constraint {
			attribute = "${attr.kernel.name}"
			value     = "linux"
		}
		constraint {
			attribute = "${attr.nomad.version}"
			semver    = ">= 1.10.0"
		}
		constraint { distinct_hosts = true }
		affinity {
			attribute = "${node.datacenter}"
			value     = "dc1"
			weight    = -20
		}
		group "g" {
			shutdown_delay = "3s"
			network {
				mode = "bridge"
				port "http" { to = 8080 }
				port "fixed" { static = 9000 }
				dns { servers = ["10.0.0.2"] }
			}
			volume "data" {
				type      = "host"
				source    = "data"
				read_only = true
			}
			task "main" {
				driver         = "docker"
				kill_timeout   = "20s"
				shutdown_delay = "1s"
				leader         = true
				config {
					image = "img"
					ports = ["http"]
					labels = { a = "b" }
					auth { username = "u" }
					mount { type = "tmpfs" }
					mount {
						type = "volume"
						volume_options {
							labels { x = "y" }
						}
					}
					logging "json" { deep = 1.5 }
				}
				env {
					PLAIN   = "1"
					NUMBER  = 2
					RUNTIME = "${NOMAD_ALLOC_ID}/${attr.cpu.arch}"
				}
				resources {
					cpu = 500
					memory = 256
					device "nvidia/gpu" { count = 1 }
				}
				template {
					data        = "hello"
					destination = "local/x"
					change_mode = "noop"
				}
				volume_mount {
					volume      = "data"
					destination = "/data"
				}
				logs { disabled = true }
			}
			task "proxy" {
				driver = "docker"
				lifecycle {
					hook    = "prestart"
					sidecar = true
				}
				config { image = "proxy" }
			}
		}
	}`

// Nomad's jobspec syntax means what it means to Nomad.
func TestParse_understands_jobspecs(t *testing.T) {
	job := parse(t, jobspec)
	must.Eq(t, "my sandbox", *job.Name)
	must.Eq(t, "agents", *job.Namespace)
	must.Eq(t, "sandboxes", *job.NodePool)
	must.Eq(t, 70, *job.Priority)
	must.Eq(t, []string{"dc1", "dc2"}, job.Datacenters)
	must.Eq(t, "v", job.Meta["dotted.key"])
	must.Eq(t, []*api.Constraint{
		{LTarget: "${attr.kernel.name}", RTarget: "linux", Operand: "="},
		{LTarget: "${attr.nomad.version}", RTarget: ">= 1.10.0", Operand: "semver"},
		{Operand: "distinct_hosts", RTarget: "true"},
	}, job.Constraints)
	must.Eq(t, []*api.Affinity{{LTarget: "${node.datacenter}", RTarget: "dc1", Operand: "=", Weight: new(int8(-20))}}, job.Affinities)

	group := job.TaskGroups[0]
	must.Eq(t, 3*time.Second, *group.ShutdownDelay)
	must.Eq(t, []api.Port{{Label: "http", To: 8080}}, group.Networks[0].DynamicPorts)
	must.Eq(t, []api.Port{{Label: "fixed", Value: 9000}}, group.Networks[0].ReservedPorts)
	must.Eq(t, []string{"10.0.0.2"}, group.Networks[0].DNS.Servers)
	must.Eq(t, map[string]*api.VolumeRequest{"data": {Name: "data", Type: "host", Source: "data", ReadOnly: true}}, group.Volumes)

	main, proxy := group.Tasks[0], group.Tasks[1]
	must.Eq(t, 20*time.Second, *main.KillTimeout)
	must.Eq(t, time.Second, main.ShutdownDelay)
	must.True(t, main.Leader)
	must.Eq(t, map[string]any{
		"image":  "img",
		"ports":  []any{"http"},
		"labels": map[string]any{"a": "b"},
		"auth":   []map[string]any{{"username": "u"}},
		"mount": []map[string]any{
			{"type": "tmpfs"},
			{"type": "volume", "volume_options": []map[string]any{{"labels": []map[string]any{{"x": "y"}}}}},
		},
		"logging": []map[string]any{{"json": []map[string]any{{"deep": json.Number("1.5")}}}},
	}, main.Config)
	must.Eq(t, "2", main.Env["NUMBER"])
	must.Eq(t, "${NOMAD_ALLOC_ID}/${attr.cpu.arch}", main.Env["RUNTIME"])
	must.Eq(t, "nvidia/gpu", main.Resources.Devices[0].Name)
	must.Eq(t, "hello", *main.Templates[0].EmbeddedTmpl)
	must.Eq(t, "/data", *main.VolumeMounts[0].Destination)
	must.True(t, *main.LogConfig.Disabled)

	// All tasks are told whom they serve, and main tasks which port is theirs.
	must.Eq(t, "${NOMAD_PORT_http}", main.Env["PORT"])
	must.Eq(t, spec().SessionID, main.Env["BIVOUAC_SESSION_ID"])
	must.Eq(t, string(spec().AccessToken), main.Env["BIVOUAC_ACCESS_TOKEN"])
	must.Eq(t, map[string]string{
		"BIVOUAC_SESSION_ID": spec().SessionID,
		"BIVOUAC_CHAT_ID":    spec().ChatID,
		"BIVOUAC_AGENT_ID":   spec().AgentID,
		"BIVOUAC_WORKSPACE":  "/workspace",
	}, proxy.Env)
	must.Eq(t, "prestart", proxy.Lifecycle.Hook)
}

// What a template must not say is refused, with the line and the reason.
func TestParse_refuses(t *testing.T) {
	cases := []struct {
		name, src string
		says      []string
	}{
		{"an unknown block on top", around(`jobs {}`, "", "", ""), []string{"test.hcl:2,", `"jobs" is not known`}},
		{"an unknown argument on top", around(`x = 1`, "", "", ""), []string{"test.hcl:2,", `"x"`}},
		{"a second ready block", around(`ready { port = "x" }`, "", "", ""), []string{"test.hcl:2,", "already a ready block"}},
		{"a syntax error", around(`= `, "", "", ""), []string{"test.hcl:2,"}},
		{"no job", `ready { port = "http" }`, []string{"needs a job block"}},
		{"an unknown argument of a job", around("", `nodepool = "x"`, "", ""), []string{"test.hcl:4,", `"nodepool"`}},
		{"an unknown block of a task", around("", "", "", `resource { cpu = 1 }`), []string{"test.hcl:12,", `"resource"`}},
		{"an argument for a block", around("", "", "", `resources = { cpu = 1 }`), []string{"test.hcl:12,", "is a block"}},
		{"a block for an argument", around("", "", "", `user { }`), []string{"test.hcl:12,", "is an argument"}},
		{"a second block of a kind", around("", "", "", "config {}\nconfig {}"), []string{"test.hcl:13,", "already a config block"}},
		{"a wrong type", around("", `priority = "high"`, "", ""), []string{"test.hcl:4,", "number"}},
		{"a wrong duration", around("", "", "", `kill_timeout = "5 minutes"`), []string{"test.hcl:12,", "duration"}},
		{"a missing label", around("", `group { }`, "", ""), []string{"test.hcl:4,", "one label"}},
		{"an unwanted label", around("", "", "", `config "x" {}`), []string{"test.hcl:12,", "no label"}},
		{"an unknown variable", around("", `priority = var.none`, "", ""), []string{"test.hcl:4,"}},
		{"an unknown name", around("", `name = local.x`, "", ""), []string{"test.hcl:4,", `"local"`}},
		{"an unknown field of session", around("", `name = session.expires`, "", ""), []string{"test.hcl:4,"}},

		{"an ID", around("", `id = "x"`, "", ""), []string{"test.hcl:4,", "derives the job's ID"}},
		{"a region", around("", `region = "x"`, "", ""), []string{"test.hcl:4,", "NOMAD_REGION"}},
		{"another type", around("", `type = "service"`, "", ""), []string{"test.hcl:4,", `only be "batch"`}},
		{"periodic", around("", `periodic { cron = "* * * * *" }`, "", ""), []string{"test.hcl:4,", "periodic"}},
		{"parameterized", around("", `parameterized { }`, "", ""), []string{"test.hcl:4,", "parameterized"}},
		{"reschedule of a job", around("", `reschedule { attempts = 1 }`, "", ""), []string{"test.hcl:4,", "not started again"}},
		{"another count", around("", "", `count = 2`, ""), []string{"test.hcl:6,", "only be 1"}},
		{"restart of a group", around("", "", `restart { attempts = 1 }`, ""), []string{"test.hcl:6,", "not started again"}},
		{"reschedule of a group", around("", "", `reschedule { attempts = 1 }`, ""), []string{"test.hcl:6,", "not started again"}},
		{"disconnect", around("", "", `disconnect { replace = true }`, ""), []string{"test.hcl:6,", "never replaces it"}},
		{"restart of a task", around("", "", "", `restart { attempts = 1 }`), []string{"test.hcl:12,", "not started again"}},

		{"a template that restarts the task", around("", "", "", "template {\ndata = \"x\"\nchange_mode = \"restart\"\n}"), []string{"test.hcl:14,", `cannot be set`, `"noop", "signal" or "script" in this template block`}},
		{"a template that says nothing of changes", around("", "", "", "template {\ndata = \"x\"\nenv = true\n}"), []string{"test.hcl:12,", "Nomad's default"}},
		{"a template that restarts by a variable", around("variable \"mode\" {\ndefault = \"restart\"\n}", "", "", "template {\ndata = \"x\"\nchange_mode = var.mode\n}"), []string{"test.hcl:16,", `"restart"`}},
		{"a template of a sidecar", around("", "", `task "s" {
			lifecycle {
				hook = "prestart"
				sidecar = true
			}
			template { data = "x" }
		}`, ""), []string{"test.hcl:11,", "Nomad's default"}},
		{"a Vault token whose change restarts the task", around("", "", "", `vault { role = "r" }`), []string{"test.hcl:12,", "Nomad's default", `"noop" or "signal" in this vault block`}},
		{"an identity whose change restarts the task", around("", "", "", "identity {\nname = \"x\"\nchange_mode = \"restart\"\n}"), []string{"test.hcl:14,", `"noop" or "signal" in this identity block`}},
		{"a signal that kills", around("", "", "", "template {\ndata = \"x\"\nchange_mode = \"signal\"\nchange_signal = \"sigkill\"\n}"), []string{"test.hcl:15,", `"SIGKILL" cannot be set`, "SIGHUP"}},
		{"a schedule", around("", "", "", `schedule {}`), []string{"test.hcl:12,", "not started again"}},
		{"a task that runs after the sandbox", around("", "", `task "p" {
			lifecycle {
				hook = "poststop"
			}
		}`, ""), []string{"test.hcl:8,", "poststop", "kill_signal"}},
		{"a kill timeout that is longer than our patience", around("", "", "", `kill_timeout = "46s"`), []string{"test.hcl:5,", "46s", "45s"}},
		{"delays that are too long together", around("", "", "shutdown_delay = \"15s\"", "shutdown_delay = \"16s\"\nkill_timeout = \"15s\""), []string{"46s"}},
		{"tasks that end one after another", around("", "", `task "s" {
			kill_timeout = "21s"
			lifecycle {
				hook = "prestart"
				sidecar = true
			}
		}
		task "l" {
			leader = true
			kill_timeout = "20s"
		}`, ""), []string{"test.hcl:5,", "add up"}},
		{"a proxy that Nomad adds", around("", "", `service {
			port = "http"
			connect {
				sidecar_service {}
				sidecar_task { kill_timeout = "35s" }
			}
		}`, "kill_timeout = \"10s\""), []string{"test.hcl:5,", "50s"}},

		{"a second group", around("", `group "other" { }`, "", ""), []string{"test.hcl:5,", "exactly one group"}},
		{"no main task", strings.Replace(around("", "", "", ""), `driver = "docker"`, `lifecycle { hook = "poststart" }`, 1), []string{"test.hcl:5,", "without a lifecycle"}},
		{"an unknown ready port", strings.Replace(around("", "", "", ""), `ready { port = "http" }`, `ready { port = "web" }`, 1), []string{"test.hcl:1,", `no port "web"`}},
		{"a ready path without http", strings.Replace(around("", "", "", ""), `{ port = "http" }`, "{\nport = \"http\"\npath = \"/\"\n}", 1), []string{"test.hcl:1,", `type "http"`}},
		{"Bivouac's own environment", around("", "", "", `env { BIVOUAC_AGENT_ID = "x" }`), []string{"set by Bivouac"}},
		{"PORT", around("", "", "", `env { PORT = "1" }`), []string{"set by Bivouac"}},
		{"Bivouac's own meta", around("", `meta { chat_id = "x" }`, "", ""), []string{"set by Bivouac"}},

		{"an environment variable's name that Nomad does not know", around("", "", "", `env { A = "${env["A.B"]}" }`), []string{"test.hcl:12,", "letters, digits"}},
		{"a name that is no name", around("", "", "", `env { A = "${meta["a b"]}" }`), []string{"test.hcl:12,", "letters, digits"}},
		{"a group of names", around("", "", "", `env { A = "${attr}" }`), []string{"test.hcl:12,", "attr.NAME"}},

		{"free text in a template", around("", "", "", "template {\ndata = \"${session.agent_id}\"\n}"), []string{"test.hcl:13,", "env, meta and config"}},
		{"free text in a name", around("", `name = session.agent_id`, "", ""), []string{"test.hcl:4,", "env, meta and config"}},
		{"free text as a key", around("", "", "", `env = { (session.agent_id) = "x" }`), []string{"test.hcl:12,", "not decide"}},
		{"free text as a choice", around("", "", "", `config { privileged = session.agent_id == "root" }`), []string{"test.hcl:12,", "not decide"}},
		{"free text in docker's volumes", around("", "", "", `config { volumes = ["${session.volume_host_path}:/w"] }`), []string{"test.hcl:12,", "mount block"}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			_, err := jobs.Parse("test.hcl", []byte(tc.src), nil)
			must.Error(t, err)
			for _, says := range tc.says {
				must.ErrorContains(t, err, says)
			}
		})
	}
}

// Saying what holds anyway is no mistake, and IDs can be used anywhere.
func TestParse_accepts(t *testing.T) {
	for name, src := range map[string]string{
		"what holds anyway":    around("", `type = "batch"`, "count = 1", ""),
		"session IDs anywhere": around("", `name = "chat ${session.chat_id}"`, "", "template {\ndata = session.id\nchange_mode = \"noop\"\n}"),
		"null for nothing":     around("", `node_pool = null`, "", ""),
		"a signal at a change": around("", "", "", "template {\ndata = \"x\"\nchange_mode = \"signal\"\nchange_signal = \"SIGUSR1\"\n}"),
		"a script at a change": around("", "", "", `template {
			data = "x"
			change_mode = "script"
			change_script {
				command = "/bin/true"
				fail_on_error = true
			}
		}`),
		// With no restarts allowed, it ends the sandbox.
		"a check that ends the sandbox": around("", "", `service {
			provider = "nomad"
			check {
				type = "http"
				check_restart { limit = 1 }
			}
		}`, ""),
		"tokens that are left as they are":        around("", "", "", "vault { change_mode = \"noop\" }\nidentity { name = \"x\" }"),
		"tasks that are just fast enough to stop": around("", "", `shutdown_delay = "5s"`, "shutdown_delay = \"10s\"\nkill_timeout = \"30s\""),
	} {
		t.Run(name, func(t *testing.T) { parse(t, src) })
	}
}

// Every mistake is told, not the first alone.
func TestParse_tells_all_mistakes(t *testing.T) {
	_, err := jobs.Parse("test.hcl", []byte(around("", "nodepool = 1", "count = 2", "restart {}")), nil)
	for _, line := range []string{"test.hcl:4,", "test.hcl:6,", "test.hcl:12,"} {
		must.ErrorContains(t, err, line)
	}
}

// One missing quotation mark makes most of the file wrong.
func TestParse_tells_the_first_syntax_errors(t *testing.T) {
	src, err := os.ReadFile(filepath.Join("templates", "docker.hcl"))
	must.NoError(t, err)
	broken := strings.Replace(string(src), `"bivouac-demo:dev"`, `"bivouac-demo:dev`, 1)
	_, err = jobs.Parse("docker.hcl", []byte(broken), nil)
	must.ErrorContains(t, err, "docker.hcl:25,")
	must.ErrorContains(t, err, "more from here on")
	must.Eq(t, 4, len(strings.Split(err.Error(), "\n")))
}

// Every name that Nomad interpolates can be written as Nomad has it.
func TestParse_leaves_interpolation_to_Nomad(t *testing.T) {
	job := parse(t, around("", "", "", `
		env {
			BOTH    = "${attr.driver.docker.version} of ${attr.driver.docker}"
			PLAIN   = attr.driver.docker.version
			DASHES  = "${attr.unique.network.ip-address}"
			KEY     = "${meta["rack.row"]}"
			HOME    = "${env["HOME"]}, ${env.HOME}"
			NUMBER  = "${attr.unique.storage.0.name}"
			LOCAL   = join(",", [for env in ["a"] : env])
			CONTEXT = NOMAD_ALLOC_ID
		}
		config {
			labels = { attr = "key" }
		}
		constraint {
			attribute = "${attr.driver.docker.version}"
			operator  = "version"
			value     = ">= 20"
		}`))
	task := job.TaskGroups[0].Tasks[0]
	for name, want := range map[string]string{
		"BOTH":    "${attr.driver.docker.version} of ${attr.driver.docker}",
		"PLAIN":   "${attr.driver.docker.version}",
		"DASHES":  "${attr.unique.network.ip-address}",
		"KEY":     "${meta.rack.row}",
		"HOME":    "${HOME}, ${HOME}",
		"NUMBER":  "${attr.unique.storage.0.name}",
		"LOCAL":   "a",
		"CONTEXT": "${NOMAD_ALLOC_ID}",
	} {
		must.Eq(t, want, task.Env[name], must.Sprint(name))
	}
	must.Eq(t, map[string]any{"attr": "key"}, task.Config["labels"].(map[string]any))
	must.Eq(t, "${attr.driver.docker.version}", task.Constraints[0].LTarget)
}

func FuzzParse(f *testing.F) {
	for _, name := range jobs.Names() {
		src, err := os.ReadFile(filepath.Join("templates", name+".hcl"))
		must.NoError(f, err)
		f.Add(string(src))
	}
	f.Add(jobspec)
	f.Add(around(`workspace = session.id`, `meta = { a = upper(session.agent_id) }`, `count = 1`, `config { x = [for k, v in {a=1}: "${k}${v}${env["A"]}"] }`))
	f.Fuzz(func(t *testing.T, src string) {
		template, err := jobs.Parse("fuzz.hcl", []byte(src), nil)
		if err != nil {
			return
		}
		// What loads gives a job for the session that it is asked for, with
		// what must hold.
		job := jobOf(t, template, spec())
		must.Eq(t, jobs.ID(spec().SessionID), *job.ID)
		must.Eq(t, "batch", *job.Type)
		must.Len(t, 1, job.TaskGroups)
		group := job.TaskGroups[0]
		must.Eq(t, 1, *group.Count)
		must.Eq(t, 0, *group.RestartPolicy.Attempts)
		must.Eq(t, 0, *group.ReschedulePolicy.Attempts)
		must.False(t, *group.ReschedulePolicy.Unlimited)
		must.False(t, *group.Disconnect.Replace)
		must.Nil(t, group.Disconnect.LostAfter)
	})
}

// Lists and events of Nomad do not say which tasks are the main ones, so the
// job's meta does.
func TestMainTasks(t *testing.T) {
	job := parse(t, around("", "", `task "web" { 
	driver = "docker" 
	}
	task "before" {
		driver = "docker"
		lifecycle { 
			hook    = "prestart" 
			sidecar = true
		}
	}
	task "after" {
		driver = "docker"
		lifecycle { 
			hook = "poststart" 
		}
	}`, ""))
	must.SliceContainsAll(t, []string{"t", "web"}, jobs.MainTasks(job.Meta))
	must.Len(t, 2, jobs.MainTasks(job.Meta))
	must.SliceEmpty(t, jobs.MainTasks(map[string]string{jobs.MetaSessionID: "of an older Bivouac"}))
}
