package stack

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shoenig/test/must"
)

func TestFits(t *testing.T) {
	for _, test := range []struct {
		name   string
		script string
		fits   bool
	}{
		{"the pinned version", "echo Nomad v1.11.3", true},
		{"another patch of it, and more lines", "echo Nomad v1.11.9; echo BuildDate 2026", true},
		{"another edition of it", "echo Nomad v1.11.3+ent", true},
		{"another minor version", "echo Nomad v1.10.3", false},
		{"a development version", "echo Nomad dev", false},
		{"nothing", "true", false},
		{"a failure", "echo Nomad v1.11.3; exit 1", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "nomad")
			must.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+test.script+"\n"), 0o755))
			must.Eq(t, test.fits, fits(t.Context(), path, "v1.11.3"))
		})
	}
}

func TestPinned(t *testing.T) {
	// Each module pins the version of its program.
	for _, name := range []string{"nomad", "consul"} {
		version, err := pinned(filepath.Join(name, "go.mod"), "github.com/hashicorp/"+name)
		must.NoError(t, err)
		must.StrHasPrefix(t, "v1.", version)
	}
	// A module that it does not pin is an error.
	_, err := pinned(filepath.Join("nomad", "go.mod"), "github.com/hashicorp/none")
	must.ErrorContains(t, err, "does not require")
}

func TestCached(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())

	// Given a build that is interrupted, then nothing is in the cache.
	cut := errors.New("cut off")
	_, err := cached("tool-1", func(out string) error {
		must.NoError(t, os.WriteFile(out, []byte("half"), 0o755))
		return cut
	})
	must.ErrorIs(t, err, cut)

	// When several need a program at once, then it is built once for all.
	var builds atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			path, err := cached("tool-1", func(out string) error {
				builds.Add(1)
				return os.WriteFile(out, []byte("whole"), 0o755)
			})
			if err != nil {
				t.Error(err)
				return
			}
			if data, err := os.ReadFile(path); err != nil || string(data) != "whole" {
				t.Errorf("%q, %v", data, err)
			}
		})
	}
	wg.Wait()
	must.Eq(t, 1, builds.Load())
}
