// Command bivouac gives every chat of an AI agent one sandbox, and never two:
// it is the agent that does so, and the command line to it.
package main

import (
	"os"

	"github.com/bivouac/bivouac/internal/command"
)

func main() { os.Exit(command.Main()) }
