package jobs_test

import (
	"fmt"
	"log"
	"time"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

func ExampleTemplate_Job() {
	template, err := jobs.Load("docker", map[string]string{"image": "sandbox:1"})
	if err != nil {
		log.Fatal(err)
	}
	job, err := template.Job(runtime.Spec{
		SessionID:      "3f0c6a52-5d1c-4b1f-9a6e-2f1b7a9d0c11",
		ChatID:         "0c9f7d54-7f4a-4b0c-9a28-4f0d7c6c1a22",
		AgentID:        "researcher",
		VolumeHostPath: "/srv/chats/42",
		CreatedAt:      time.Unix(0, 0),
		ExpiresAt:      time.Unix(1800, 0),
	}, "default")
	if err != nil {
		log.Fatal(err)
	}
	task := job.TaskGroups[0].Tasks[0]
	fmt.Println(*job.ID)
	fmt.Println(job.Meta[jobs.MetaAgentID], task.Driver, task.Config["image"])
	// Output:
	// bivouac-3f0c6a52-5d1c-4b1f-9a6e-2f1b7a9d0c11
	// researcher docker sandbox:1
}
