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

func main() {
	if err := command(); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func command() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	p := fullRun()
	flag.DurationVar(&p.duration, "duration", p.duration, "how long faults are provoked, quiet periods included")
	flag.Uint64Var(&p.seed, "seed", rand.Uint64(), "decides which faults and requests come when")
	flag.StringVar(&p.binary, "bivouac", "", "bivouac to run; empty builds that of this source tree")
	flag.BoolVar(&p.keep, "keep", false, "keep the timeline and the logs also where everything held")
	flag.Parse()
	report, err := run(ctx, p)
	if report != nil {
		fmt.Print(report)
	}
	return err
}

// plan says what a run is.
type plan struct {
	seed     uint64
	duration time.Duration
	stir     time.Duration // how long faults come between two quiet periods
	chats    int
	workers  int
	binary   string // empty: built
	keep     bool   // keep the logs of a run in which everything held
}

func fullRun() plan {
	return plan{duration: 32 * time.Minute, stir: 165 * time.Second, chats: 20, workers: 8}
}

// run makes one run, and returns an error where something did not hold. What is
// needed to find out why is kept then.
func run(ctx context.Context, p plan) (*report, error) {
	dir, err := os.MkdirTemp("", "bivouac-chaos-")
	if err != nil {
		return nil, err
	}
	log, err := newTimeline(dir)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "chaos: seed %d, %s, logs in %s\n", p.seed, p.duration, dir)
	w, err := newWorld(ctx, dir, log, p)
	if err != nil {
		return nil, errors.Join(err, log.close())
	}
	r, err := w.run(ctx)
	err = errors.Join(err, w.stop(p.keep || err != nil), log.close())
	if err != nil {
		return r, fmt.Errorf("%w\nseed %d; the timeline and the logs are in %s", err, p.seed, dir)
	}
	if p.keep {
		return r, nil
	}
	return r, os.RemoveAll(dir)
}

// run stirs and settles in turn until the time is over.
func (w *world) run(ctx context.Context) (*report, error) {
	began := time.Now()
	w.watch(ctx)
	err := w.cycles(ctx, began.Add(w.plan.duration))
	w.halt()
	r := w.report(time.Since(began))
	if n := w.log.violations(); n > 0 {
		err = errors.Join(err, fmt.Errorf("%d violations:\n%s", n, w.log.worst()))
	}
	return r, err
}

func (w *world) cycles(ctx context.Context, end time.Time) error {
	for round := 1; time.Now().Before(end) && ctx.Err() == nil; round++ {
		w.log.note("round %d", round)
		if err := w.stir(ctx, min(w.plan.stir, time.Until(end))); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		if ctx.Err() != nil {
			break
		}
		if err := w.settle(ctx); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		fmt.Fprintf(os.Stderr, "chaos: %s\n", w.progress(round))
	}
	return ctx.Err()
}
