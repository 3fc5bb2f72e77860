package stack

import (
	"testing"

	"github.com/shoenig/test/must"
)

func TestImage(t *testing.T) {
	// Given an image of a program.
	needDocker(t)
	ctx, name := limited(t), "bivouac-stack-test:dev"
	image := func(program string) (id string) {
		must.NoError(t, importImage(ctx, name, []file{{name: "bivouac", content: []byte(program)}}))
		id, err := docker(ctx, nil, "image", "inspect", "--format={{.Id}}", name)
		must.NoError(t, err)
		return id
	}
	first := image("one")

	// When it is made again, then it is the same image.
	must.Eq(t, first, image("one"))

	// When the program has changed, then the image has too, and the first image
	// is gone.
	must.NotEq(t, first, image("two"))
	_, err := docker(ctx, nil, "image", "inspect", first)
	must.Error(t, err)
	_, err = docker(ctx, nil, "image", "rm", name)
	must.NoError(t, err)
}
