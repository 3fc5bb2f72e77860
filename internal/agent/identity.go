package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/internal/api/wire"
	"github.com/bivouac/bivouac/internal/pluginhost"
	"github.com/bivouac/bivouac/internal/store/consul"
	"github.com/bivouac/bivouac/runtime/nomad"
	"github.com/bivouac/bivouac/scheduler"
)

// whenReady returns a function that calls run once ready is closed.
func whenReady(ready <-chan struct{}, run func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ready:
			return run(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// identify returns the part that waits for the identity of the store and passes it to the
// drivers. driver is nil if Nomad is not used.
func (b *base) identify(store *consul.Store, driver *nomad.Driver, host *pluginhost.Host, log hclog.Logger) part {
	return part{"identity", func(ctx context.Context) error {
		own, err := store.Identity(ctx)
		if err != nil {
			return err
		}
		if driver != nil {
			driver.SetInstance(own.Instance, own.LegacyInstance)
		}
		// A plugin knows only one ID. Its older sandboxes have the legacy one.
		host.SetInstance(cmp.Or(own.LegacyInstance, own.Instance))
		close(b.identified)
		log.Info("instance_known", "instance", own.Instance, "legacy_instance", own.LegacyInstance)
		<-ctx.Done()
		return nil
	}}
}

// place returns a function that returns where in Nomad the sandboxes run. If ask is false,
// because the server can serve without Nomad, it does not request the region from Nomad.
func place(client *nomadapi.Client, token nomad.Token, region, namespace string, ask bool) func(context.Context) (consul.Place, error) {
	return func(ctx context.Context) (consul.Place, error) {
		place := consul.Place{Region: region, Namespace: cmp.Or(namespace, nomadapi.DefaultNamespace)}
		var err error
		if region == "" && ask {
			place.Region, err = agentRegion(ctx, client, token.Value())
		}
		return place, err
	}
}

// regionLimit is how long Nomad may take to return its region.
const regionLimit = 10 * time.Second

// agentRegion returns the region of the Nomad agent that the client is connected to. It
// returns "" if there are several regions and the token may not read which one it is.
func agentRegion(ctx context.Context, client *nomadapi.Client, token string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, regionLimit)
	defer cancel()
	opts := (&nomadapi.QueryOptions{AuthToken: token}).WithContext(ctx)
	var regions []string
	if _, err := client.Raw().Query("/v1/regions", &regions, opts); err != nil {
		return "", fmt.Errorf("list the regions of Nomad: %w", err)
	}
	if len(regions) == 1 {
		return regions[0], nil
	}
	var self nomadapi.AgentSelf
	_, err := client.Raw().Query("/v1/agent/self", &self, opts)
	if refusal, ok := errors.AsType[nomadapi.UnexpectedResponseError](err); ok && refusal.StatusCode() == http.StatusForbidden {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("ask Nomad for its region: %w", err)
	}
	region, _ := self.Config["Region"].(string) // empty if it is missing
	return region, nil
}

// operator carries out an operator's decision about a store without an identity.
type operator struct {
	store      *consul.Store
	identified <-chan struct{}
	adopt      func(ctx context.Context) (scheduler.AdoptResult, error)
}

// Adopt implements [api.Operator].
func (o operator) Adopt(ctx context.Context, instance string) (wire.AdoptAnswer, error) {
	own, err := o.store.Adopt(ctx, instance)
	if err != nil {
		return wire.AdoptAnswer{}, err
	}
	select {
	case <-o.identified: // the drivers need the identity too
	case <-ctx.Done():
		return wire.AdoptAnswer{}, ctx.Err()
	}
	result, err := o.adopt(ctx)
	if err != nil {
		return wire.AdoptAnswer{}, err
	}
	return wire.AdoptAnswer{Instance: own.Instance, Adopted: len(result.Adopted), Failed: len(result.Left)}, nil
}

// Forget implements [api.Operator].
func (o operator) Forget(ctx context.Context) (wire.ForgetAnswer, error) {
	own, left, err := o.store.Forget(ctx)
	if err != nil {
		return wire.ForgetAnswer{}, err
	}
	answer := wire.ForgetAnswer{Instance: own.Instance, Left: []wire.Left{}}
	for _, instance := range slices.Sorted(maps.Keys(left)) {
		answer.Left = append(answer.Left, wire.Left{
			Instance: instance, Sandboxes: left[instance],
			Look: fmt.Sprintf(`nomad operator api -filter 'Meta.bivouac_instance == %q' /v1/jobs`, instance),
		})
	}
	return answer, nil
}
