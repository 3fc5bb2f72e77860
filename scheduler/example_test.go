package scheduler_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/bivouac/bivouac/internal/store/memory"
	"github.com/bivouac/bivouac/internal/test/fakeruntime"
	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/scheduler"
)

func ExampleScheduler_Create() {
	store := memory.NewStore()
	sessions, err := scheduler.New(scheduler.Config{
		Store:           store,
		Locker:          memory.NewLocker(store),
		Drivers:         map[string]runtime.Driver{"fake": fakeruntime.New("fake")},
		DefaultRuntime:  "fake",
		TTL:             30 * time.Minute,
		MaxTTL:          24 * time.Hour,
		CleanupInterval: 15 * time.Second,
		Logger:          hclog.NewNullLogger(),
		Meter:           metricnoop.NewMeterProvider().Meter(""),
		Tracer:          tracenoop.NewTracerProvider().Tracer(""),
		Now:             time.Now,
	})
	if err != nil {
		log.Fatal(err)
	}
	command := scheduler.CreateCommand{
		ChatID:         uuid.MustParse("0c9f7d54-7f4a-4b0c-9a28-4f0d7c6c1a22"),
		AgentID:        "researcher",
		VolumeHostPath: "/srv/chats/42",
	}
	for range 2 {
		created, err := sessions.Create(context.Background(), command)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(created.Result)
	}
	// Output:
	// created
	// reused
}
