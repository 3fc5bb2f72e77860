package main

import (
	"os"
	"testing"

	"github.com/bivouac/bivouac/internal/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }
