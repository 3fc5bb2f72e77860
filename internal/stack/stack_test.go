package stack_test

import (
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/stack"
)

func TestDevConsul(t *testing.T) {
	c, err := stack.StartConsul(t.Context(), stack.ConsulConfig{})
	must.NoError(t, err)
	must.NoError(t, c.Stop())
}

func TestDevNomad(t *testing.T) {
	n, err := stack.StartNomad(t.Context(), stack.NomadConfig{})
	must.NoError(t, err)
	must.NoError(t, n.Stop())
}
