package stack

import (
	"testing"

	"github.com/shoenig/test/must"
)

func TestPortBlock(t *testing.T) {
	// Given two blocks, then they share no port.
	a, err := newPortBlock()
	must.NoError(t, err)
	b, err := newPortBlock()
	must.NoError(t, err)
	must.NotEq(t, a.base, b.base)

	// A port that is in use is skipped.
	first, err := a.port()
	must.NoError(t, err)
	taken, err := listen(first + 1)
	must.NoError(t, err)
	second, err := a.port()
	must.NoError(t, err)
	must.Eq(t, first+2, second)
	must.NoError(t, taken.Close())

	// Clients share the ports that agents do not use, without overlap.
	low, high := a.sandboxPorts(0, 2)
	must.Eq(t, a.base+agentPorts, low)
	next, last := a.sandboxPorts(1, 2)
	must.Eq(t, high+1, next)
	must.Eq(t, a.base+blockSize-1, last)

	// A released block can be used again.
	must.NoError(t, a.release())
	again, err := listen(a.base)
	must.NoError(t, err)
	must.NoError(t, again.Close())
	must.NoError(t, b.release())
}

func TestFreePort(t *testing.T) {
	// FreePort returns the preferred port if it is free, and another one if it
	// is taken.
	l, err := listen(0)
	must.NoError(t, err)
	port := portOf(l)
	other, err := FreePort(port)
	must.NoError(t, err)
	must.NotEq(t, port, other)
	must.NoError(t, l.Close())
	same, err := FreePort(port)
	must.NoError(t, err)
	must.Eq(t, port, same)
}
