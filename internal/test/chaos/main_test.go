package main

import (
	"os"
	"testing"

	// The tests build and run it, so it is part of what their results depend on.
	_ "github.com/bivouac/bivouac/internal/command"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }
