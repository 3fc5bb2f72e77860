package main

import (
	"os"
	"testing"

	// The tests build and run the bivouac command. The import makes their cached
	// results depend on it.
	_ "github.com/bivouac/bivouac/internal/command"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }
