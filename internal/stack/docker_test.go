package stack

import (
	"testing"

	"github.com/shoenig/test/must"
)

func TestDemoImage(t *testing.T) {
	// Given the image.
	name := DockerForTest(t)
	first, err := docker(t.Context(), nil, "image", "inspect", "--format={{.Id}}", name)
	must.NoError(t, err)

	// When it is asked for again, then it is the same one.
	again, err := DemoImage(t.Context())
	must.NoError(t, err)
	must.Eq(t, name, again)
	second, err := docker(t.Context(), nil, "image", "inspect", "--format={{.Id}}", name)
	must.NoError(t, err)
	must.Eq(t, first, second)
}
