package main

import (
	"os"
	"testing"

	// The tests build and run this package. The import makes it part of their
	// test cache key.
	_ "github.com/bivouac/bivouac/internal/command"
	"github.com/bivouac/bivouac/internal/test/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }
