package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"
)

// output is when a request or a program printed.
type output struct {
	first, end time.Duration // its first byte, and its end or its limit
	bytes      int64
}

// readOutput reads to the end, or limit bytes. No output is an error.
func readOutput(began time.Time, from io.Reader, limit int64) (output, error) {
	var out output
	n, err := io.ReadFull(from, make([]byte, 1))
	out.first = time.Since(began)
	if err != nil {
		return out, fmt.Errorf("it printed nothing: %w", err)
	}
	more, err := io.Copy(io.Discard, io.LimitReader(from, limit-int64(n)))
	out.end, out.bytes = time.Since(began), int64(n)+more
	return out, err
}

// runProgram runs a program until it ends, or has printed limit bytes.
func runProgram(ctx context.Context, limit int64, env []string, name string, args ...string) (output, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return output{}, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return output{}, err
	}
	out, err := readOutput(began, stdout, limit)
	if err == nil && out.bytes == limit {
		cancel() // it would go on
		_ = cmd.Wait()
		return out, nil
	}
	err = errors.Join(err, cmd.Wait())
	out.end = time.Since(began)
	if err != nil {
		return out, fmt.Errorf("%s %s: %w: %s", name, args[0], err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// request sends a request to a replica and reads limit bytes of its answer.
func (r *replica) request(ctx context.Context, limit int64, method, path, body string) (output, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+r.Addr+path, strings.NewReader(body))
	if err != nil {
		return output{}, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	began := time.Now()
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return output{}, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		return output{}, errors.Join(fmt.Errorf("%s %s: %s: %s", method, path, res.Status, text), err)
	}
	return readOutput(began, res.Body, limit)
}
