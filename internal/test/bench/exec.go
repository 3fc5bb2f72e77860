package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/apiclient"
	"github.com/bivouac/bivouac/internal/test/stack"
)

// exec measures a small command in a sandbox, until its first byte and as a whole. Nomad's
// command line, Bivouac's, and Bivouac's API run it in the same sandbox, in turns.
func (w *world) exec(ctx context.Context, rounds int) (report, error) {
	var out report
	for _, in := range []struct {
		template string
		command  []string
	}{
		{"raw_exec", []string{"echo", "x"}},
		{"docker", []string{"/bivouac", "version"}}, // its image contains nothing else
	} {
		if in.template == "docker" && w.image == "" {
			continue
		}
		rows, err := w.execIn(ctx, in.template, in.command, rounds)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", in.template, err)
		}
		out = append(out, rows...)
	}
	return out, nil
}

func (w *world) execIn(ctx context.Context, template string, command []string, rounds int) (report, error) {
	nomad, err := stack.NomadBinary(ctx)
	if err != nil {
		return nil, err
	}
	r, err := w.startReplica(ctx, replicaConfig{consul: w.consul.Addr(), nomad: w.nomad.Addr(), prefix: "exec-" + template, template: template})
	if err != nil {
		return nil, err
	}
	chat := uuid.New()
	alloc, err := r.createAllocation(ctx, chat)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(map[string]any{"command": command})
	if err != nil {
		return nil, err
	}
	sides := []struct {
		what string
		run  func() (output, error)
	}{
		{"nomad alloc exec", func() (output, error) {
			args := append([]string{"alloc", "exec", "-i=false", "-t=false", alloc}, command...)
			return runProgram(ctx, math.MaxInt64, []string{"NOMAD_ADDR=http://" + w.nomad.Addr()}, nomad, args...)
		}},
		{"bivouac session exec", func() (output, error) {
			args := append([]string{"session", "exec", chat.String(), "--"}, command...)
			return runProgram(ctx, math.MaxInt64, []string{"BIVOUAC_ADDR=http://" + r.Addr}, w.binary, args...)
		}},
		{"POST exec", func() (output, error) {
			return r.request(ctx, math.MaxInt64, "POST", "/v1/sessions/"+chat.String()+"/exec", string(body))
		}},
	}
	times := stopwatch{}
	for round := range rounds + 1 { // the first round is a warm-up
		for _, s := range sides {
			took, err := s.run()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.what, err)
			}
			if round > 0 {
				times[s.what+", first byte"] = append(times[s.what+", first byte"], took.first)
				times[s.what+", whole"] = append(times[s.what+", whole"], took.end)
			}
		}
	}
	var out report
	for _, what := range []string{", first byte", ", whole"} {
		base := timed("exec, "+template, sides[0].what+what, times[sides[0].what+what])
		out = append(out, base)
		for _, s := range sides[1:] {
			r := timed("exec, "+template, s.what+what, times[s.what+what])
			r.against(base)
			out = append(out, r)
		}
	}
	if err := r.delete(ctx, chat); err != nil {
		return nil, err
	}
	return out, r.Stop()
}

// createAllocation creates the chat's session and returns the ID of its allocation.
func (r *replica) createAllocation(ctx context.Context, chat uuid.UUID) (string, error) {
	if err := r.create(ctx, chat); err != nil {
		return "", err
	}
	found, _, err := r.api.Get(ctx, chat, apiclient.Block{})
	return found.Session.ContainerID, err
}
