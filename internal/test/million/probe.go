package main

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

// probeEvery is how often the probe writes.
const probeEvery = 5 * time.Millisecond

// probe writes a key to Consul again and again, and remembers how long each write took.
type probe struct {
	mu   sync.Mutex
	took []time.Duration // since the last take
	err  error
	stop func()
}

func startProbe(ctx context.Context, addr string) (*probe, error) {
	config := api.DefaultConfig()
	config.Address = addr
	client, err := api.NewClient(config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	p := new(probe)
	ended := make(chan struct{})
	p.stop = func() {
		cancel()
		<-ended
	}
	go func() {
		defer close(ended)
		tick := time.NewTicker(probeEvery)
		defer tick.Stop()
		for ctx.Err() == nil {
			began := time.Now()
			_, err := client.KV().Put(&api.KVPair{Key: "probe", Value: []byte(began.String())}, new(api.WriteOptions).WithContext(ctx))
			p.note(ctx, time.Since(began), err)
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}()
	return p, nil
}

func (p *probe) note(ctx context.Context, took time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case ctx.Err() != nil:
	case err != nil:
		p.err = err
	default:
		p.took = append(p.took, took)
	}
}

// take returns how long the writes since the last call took, sorted.
func (p *probe) take() ([]time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	took := p.took
	p.took = nil
	slices.Sort(took)
	return took, p.err
}
