package conformance_test

import (
	"io"
	"os/exec"
	"sync"

	"github.com/bivouac/bivouac/internal/terminal"
	"github.com/bivouac/bivouac/runtime"
)

// attachTerminal connects a command to its streams over a terminal.
func attachTerminal(cmd *exec.Cmd, command runtime.Command, streams runtime.Streams) (started, finish func(), err error) {
	user, program, err := terminal.Open()
	if err != nil {
		return nil, nil, err
	}
	_ = terminal.Resize(user, command.Size)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
	cmd.SysProcAttr.Setctty = true
	ended := make(chan struct{})
	var reading sync.WaitGroup
	started = func() {
		_ = program.Close()
		reading.Go(func() { _, _ = io.Copy(streams.Stdout, user) }) // it fails when no program has the terminal
		go func() { _, _ = io.Copy(user, streams.Stdin) }()         // it may wait in a Read that only the caller can end
		reading.Go(func() {
			for {
				select {
				case size := <-streams.Resize:
					_ = terminal.Resize(user, size)
				case <-ended:
					return
				}
			}
		})
	}
	finish = func() {
		_ = program.Close()
		close(ended)
		reading.Wait()
		_ = user.Close()
	}
	return started, finish, nil
}
