package nomad

import (
	"context"
	"fmt"
	"slices"

	"github.com/hashicorp/nomad/api"

	"github.com/bivouac/bivouac/jobs"
	"github.com/bivouac/bivouac/runtime"
)

// FindChat implements [runtime.ChatFinder]. While [Driver.Run] follows Nomad's
// events, FindChat makes no request if the chat has no other job. Otherwise it
// lists the chat's jobs. It reads each other job from Nomad, because the event for
// a sandbox that another replica has just ended may not have arrived yet.
//
// It also finds a spare that the chat has claimed, unless the helper on its node does not
// answer and this driver has not heard of the claim before. A claim through another driver
// is heard of within a moment while Run follows the helpers. FindChat asks the helpers that
// have not been heard yet, which takes 5 seconds at most, and all of them while Run does not
// follow Nomad's events.
func (d *Driver) FindChat(ctx context.Context, chatID, except string) ([]runtime.Sandbox, error) {
	claimed, err := d.askBound(ctx, chatID, !d.cache.isCurrent())
	if err != nil {
		return nil, err
	}
	jobIDs, current := d.cache.ofChat(chatID)
	if !current {
		listed, err := d.listChat(ctx, chatID)
		if err != nil {
			return nil, err
		}
		jobIDs = append(jobIDs, listed...)
	}
	jobIDs = append(jobIDs, claimed...)
	slices.Sort(jobIDs)
	jobIDs = slices.Compact(jobIDs)
	var found []runtime.Sandbox
	for _, id := range jobIDs {
		if id == jobs.ID(except) {
			continue
		}
		s, err := d.read(ctx, id)
		if err != nil {
			return nil, err
		}
		if sandbox, ok := d.sandbox(s); ok && sandbox.ChatID == chatID && sandbox.State != runtime.StateDead {
			found = append(found, sandbox)
		}
	}
	return found, nil
}

// listChat lists the IDs of a chat's jobs in Nomad.
func (d *Driver) listChat(ctx context.Context, chatID string) ([]string, error) {
	filter := fmt.Sprintf("%q in Meta and Meta.%s == %q", jobs.MetaChatID, jobs.MetaChatID, chatID)
	var page []*api.JobListStub
	read := func(opts *api.QueryOptions) (meta *api.QueryMeta, err error) {
		page, meta, err = d.client.Jobs().List(opts)
		return meta, err
	}
	var jobIDs []string
	for err := range d.pages(ctx, jobs.IDPrefix, filter, nil, read) {
		if err != nil {
			return nil, failed(ctx, "list the jobs of chat "+chatID, err)
		}
		for _, job := range page {
			jobIDs = append(jobIDs, job.ID)
		}
	}
	return jobIDs, nil
}

// Answers implements [runtime.Prober]. It makes the template's ready check once,
// and returns false if there is no answer within 2 seconds.
//
// If the ready check has session_id set, an answer proves that the session's
// sandbox still serves. Otherwise an answer only proves that some process serves.
// It may be another process that got the port since, and then the session counts
// as alive for as long as that process answers. A missing answer does not prove
// that no process is left: one that has closed its port may take some time to end.
func (d *Driver) Answers(ctx context.Context, sessionID string, endpoint runtime.Endpoint) (bool, error) {
	err := d.checkOnce(ctx, sessionID, endpoint)
	if err != nil && ctx.Err() != nil {
		return false, fmt.Errorf("nomad: ask session %s at %s: %w", sessionID, endpoint.AddrPort(), ctx.Err())
	}
	return err == nil, nil
}

// checkOnce makes the template's ready check once.
func (d *Driver) checkOnce(ctx context.Context, sessionID string, endpoint runtime.Endpoint) error {
	check := d.template.Ready().Check
	check.Dial = d.dial
	return check.Once(ctx, endpoint, sessionID)
}
