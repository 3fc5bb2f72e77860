package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/test/stack"
)

const logsPart = "reading logs"

// printed is how many bytes the sandbox of this part has printed.
const printed = 24 << 20

// printer is a template whose sandbox prints, with logs that are large enough.
const printer = `
workspace = session.volume_host_path

ready {
  port = "http"
}

job {
  datacenters = ["*"]

  group "sandbox" {
    network {
      port "http" {}
    }

    task "sandbox" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c %d; exec %s demo-sandbox"]
      }

      env {
        BIVOUAC_BIND = "${NOMAD_IP_http}"
      }

      logs {
        max_files     = 2
        max_file_size = 32
      }
    }
  }
}
`

// readLogs measures how long followers of a sandbox's logs wait for the first byte, and
// how fast they get the rest of what the sandbox printed before.
func (w *world) readLogs(ctx context.Context, rounds int) (report, error) {
	nomad, err := stack.NomadBinary(ctx)
	if err != nil {
		return nil, err
	}
	template := filepath.Join(w.dir, "printer.hcl")
	if err := os.WriteFile(template, fmt.Appendf(nil, printer, printed, w.binary), 0o600); err != nil {
		return nil, err
	}
	r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: "logs", template: template})
	if err != nil {
		return nil, err
	}
	chat := uuid.New()
	alloc, err := r.createAllocation(ctx, chat)
	if err != nil {
		return nil, err
	}
	sides := []struct {
		what string
		run  func() (output, error)
	}{
		{"nomad alloc logs", func() (output, error) {
			return runProgram(ctx, printed, []string{"NOMAD_ADDR=http://" + w.nomad.Addr()}, nomad, "alloc", "logs", "-f", alloc)
		}},
		{"bivouac session logs", func() (output, error) {
			return runProgram(ctx, printed, []string{"BIVOUAC_ADDR=http://" + r.Addr}, w.binary, "session", "logs", "-f", chat.String())
		}},
		{"GET logs", func() (output, error) {
			return r.request(ctx, printed, "GET", "/v1/sessions/"+chat.String()+"/logs?follow=true", "")
		}},
	}
	times, rest := stopwatch{}, make(map[string]time.Duration)
	for round := range rounds + 1 { // the first round is a warm-up
		for _, s := range sides {
			took, err := s.run()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.what, err)
			}
			if took.bytes != printed {
				return nil, fmt.Errorf("%s: it printed %d of %d bytes", s.what, took.bytes, printed)
			}
			if round > 0 {
				times[s.what] = append(times[s.what], took.first)
				rest[s.what] += took.end - took.first
			}
		}
	}
	var out, speeds report
	for _, s := range sides {
		first := timed(logsPart, s.what+", first byte", times[s.what])
		speed := row{Part: logsPart, What: s.what + ", speed", N: rounds, Unit: "MB per s",
			Count: float64(rounds) * printed / 1e6 / rest[s.what].Seconds()}
		if len(out) > 0 {
			first.against(out[0])
			speed.against(speeds[0])
		}
		out, speeds = append(out, first), append(speeds, speed)
	}
	if err := r.delete(ctx, chat); err != nil {
		return nil, err
	}
	return append(out, speeds...), r.Stop()
}
