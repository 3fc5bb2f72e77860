package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/bivouac/bivouac/internal/store/consul"
)

const (
	// maxOps is how many operations Consul accepts in a transaction.
	maxOps = 128
	// fillers is how many transactions are under way at a time.
	fillers = 4
	// told is after how many records the progress is printed.
	told = 100_000
)

// withStore calls use with a store that runs.
func withStore(ctx context.Context, addr, prefix string, use func(context.Context, *consul.Store) error) error {
	config := api.DefaultConfig()
	config.Address = addr
	client, err := consul.NewClient(config, nil)
	if err != nil {
		return err
	}
	store, err := consul.New(client, consul.Config{Prefix: prefix + "/", Instance: prefix, Name: "million", Logger: hclog.NewNullLogger()})
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- store.Run(running) }()
	_, err = store.Identity(ctx)
	if err == nil {
		err = use(ctx, store)
	}
	stop()
	return errors.Join(err, <-ran)
}

// fill writes the records of the first n standing sessions below a prefix.
func fill(ctx context.Context, addr, prefix string, n int) error {
	// The store must have its identity before the first record.
	if err := withStore(ctx, addr, prefix, func(context.Context, *consul.Store) error { return nil }); err != nil {
		return err
	}
	config := api.DefaultConfig()
	config.Address = addr
	client, err := api.NewClient(config)
	if err != nil {
		return err
	}
	now := time.Now()
	var next, written atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range fillers {
		g.Go(func() error {
			var ops api.TxnOps
			records := 0
			flush := func() error {
				if err := set(ctx, client, ops); err != nil {
					return err
				}
				if all := written.Add(int64(records)); all/told > (all-int64(records))/told {
					fmt.Fprintf(os.Stderr, "filled %s: %d records\n", prefix, all)
				}
				ops, records = ops[:0], 0
				return nil
			}
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				pairs, err := consul.Entries(prefix, sessionOf(uint32(i), now))
				if err != nil {
					return err
				}
				if len(ops)+len(pairs) > maxOps {
					if err := flush(); err != nil {
						return err
					}
				}
				for _, pair := range pairs {
					ops = append(ops, &api.TxnOp{KV: &api.KVTxnOp{Verb: api.KVSet, Key: pair.Key, Value: pair.Value}})
				}
				records++
			}
			return flush()
		})
	}
	return g.Wait()
}

// set makes one transaction of writes.
func set(ctx context.Context, client *api.Client, ops api.TxnOps) error {
	if len(ops) == 0 {
		return nil
	}
	ok, response, _, err := client.Txn().Txn(ops, new(api.QueryOptions).WithContext(ctx))
	if err == nil && !ok {
		err = fmt.Errorf("fill: %v", response.Errors[0].What)
	}
	return err
}
