package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// errBroken ends a run with violations. Any other error is the suite's own
// trouble and does not concern Bivouac.
var errBroken = errors.New("something did not hold")

func main() {
	err := command()
	switch {
	case errors.Is(err, errBroken):
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "chaos: the suite itself could not go on, which says nothing of Bivouac:", err)
		os.Exit(2)
	}
}

func command() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	p := fullRun()
	flag.DurationVar(&p.duration, "duration", p.duration, "how long faults are provoked, quiet periods included")
	flag.IntVar(&p.times, "times", p.times, "how often each fault is provoked at least; the run goes on until then, at most for twice its duration")
	flag.Uint64Var(&p.seed, "seed", rand.Uint64(), "decides which faults and requests come when")
	flag.StringVar(&p.binary, "bivouac", "", "bivouac to run, built with the tag failpoints; empty builds that of this source tree")
	flag.BoolVar(&p.keep, "keep", false, "keep the timeline and the logs also where everything held")
	flag.Parse()
	report, err := run(ctx, p)
	fmt.Print(report)
	return err
}

// plan holds the parameters of a run.
type plan struct {
	seed     uint64
	duration time.Duration
	times    int           // minimum number of each fault
	stir     time.Duration // how long faults come between two quiet periods
	chats    int
	workers  int
	burst    int    // callers that want the sandbox of one chat at once
	binary   string // empty: build it
	keep     bool   // keep the logs even if there were no violations
}

func fullRun() plan {
	return plan{duration: 32 * time.Minute, times: 20, stir: 165 * time.Second, chats: 20, workers: 8, burst: 500}
}

// run makes one run and returns an error if there were violations. It then
// keeps the logs.
func run(ctx context.Context, p plan) (report string, err error) {
	dir, err := os.MkdirTemp("", "bivouac-chaos-")
	if err != nil {
		return "", err
	}
	log, err := newTimeline(dir)
	if err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "chaos: seed %d, %s, logs in %s\n", p.seed, p.duration, dir)
	w, err := newWorld(ctx, dir, log, p)
	if err != nil {
		return "", errors.Join(err, log.close())
	}
	report, err = w.run(ctx)
	err = errors.Join(err, w.stop(p.keep || err != nil), log.close())
	if err != nil {
		return report, fmt.Errorf("%w\nseed %d; the timeline and the logs are in %s", err, p.seed, dir)
	}
	if p.keep {
		return report, nil
	}
	return report, os.RemoveAll(dir)
}
