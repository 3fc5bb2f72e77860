package plugin_test

import (
	"context"
	"iter"

	"github.com/bivouac/bivouac/runtime"
	"github.com/bivouac/bivouac/runtime/plugin"
)

// myDriver runs sandboxes on an engine of its author's.
type myDriver struct{}

func (myDriver) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "my-runtime", Version: "0.1.0"}, nil
}

func (myDriver) Create(context.Context, runtime.Spec, func(runtime.Stage)) (runtime.Sandbox, error) {
	return runtime.Sandbox{}, runtime.ErrNotPlaced
}
func (myDriver) Stop(context.Context, string) error   { return nil }
func (myDriver) Delete(context.Context, string) error { return nil }
func (myDriver) Inspect(context.Context, string) (runtime.Sandbox, error) {
	return runtime.Sandbox{}, runtime.ErrNotFound
}

func (myDriver) List(context.Context) iter.Seq2[runtime.Sandbox, error] {
	return func(func(runtime.Sandbox, error) bool) {}
}

// Serve is all that a plugin's main does. It needs a host at the other end, so
// this example is compiled and not run.
func ExampleServe() {
	plugin.Serve(myDriver{})
}
