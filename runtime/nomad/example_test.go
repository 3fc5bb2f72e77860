package nomad_test

import (
	"context"
	"fmt"
	"log"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime/nomad"
)

func ExampleNew() {
	client, err := api.NewClient(api.DefaultConfig())
	if err != nil {
		log.Fatal(err)
	}
	template, err := jobs.Load("docker", map[string]string{"image": "sandbox:1"})
	if err != nil {
		log.Fatal(err)
	}
	driver, err := nomad.New(nomad.Config{
		Client: client, Template: template, Instance: "default", Logger: hclog.NewNullLogger(),
	})
	if err != nil {
		log.Fatal(err)
	}
	info, err := driver.Info(context.Background())
	fmt.Println(info.Name, err)
	// Then driver.Run(ctx) follows Nomad's events, and the driver is ready for use.

	// Output: nomad <nil>
}
