package runtime_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/bivouac/bivouac/runtime"
)

func ExampleSpec_Validate() {
	spec := runtime.Spec{
		SessionID:      "3f0c6a52-5d1c-4b1f-9a6e-2f1b7a9d0c11",
		ChatID:         "0c9f7d54-7f4a-4b0c-9a28-4f0d7c6c1a22",
		AgentID:        "researcher",
		VolumeHostPath: "srv/chats/42",
	}
	fmt.Println(spec.Validate())
	// Output: volume host path is not absolute
}

// A driver says what is wrong by wrapping one of the package's errors.
func Example_errors() {
	inspect := func(context.Context, string) (runtime.Sandbox, error) {
		return runtime.Sandbox{}, fmt.Errorf("my engine: %w", runtime.ErrNotFound)
	}
	_, err := inspect(context.Background(), "3f0c6a52-5d1c-4b1f-9a6e-2f1b7a9d0c11")
	fmt.Println(errors.Is(err, runtime.ErrNotFound), err)
	// Output: true my engine: sandbox not found
}
