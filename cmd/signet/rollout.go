package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/api/client"
)

// waitOptions says whether and how long to wait for the hosts.
type waitOptions struct {
	wait    bool
	timeout time.Duration
}

func (o *waitOptions) register(c *cobra.Command) {
	c.Flags().BoolVar(&o.wait, "wait", false, "wait until every connected host has the revision")
	c.Flags().DurationVar(&o.timeout, "timeout", time.Minute, "how long --wait waits")
}

// applied waits where that was asked, and prints the revision in any case: it was committed, whatever the hosts do.
func (a *app) applied(ctx context.Context, c *client.Client, applied apitypes.PolicyApplied, o waitOptions) error {
	if err := a.print(applied, func(w io.Writer) { say(w, "%d", applied.Revision) }); err != nil || !o.wait {
		return err
	}
	return a.waitRollout(ctx, c, applied.Revision, o.timeout)
}

// waitRollout reports each host once, when it has the revision.
func (a *app) waitRollout(ctx context.Context, c *client.Client, revision uint64, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(a.poll)
	defer tick.Stop()
	told := map[string]string{}
	var last apitypes.Rollout
	for {
		r, err := c.Rollout(ctx, revision)
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("revision %d was applied, but its rollout cannot be followed: %w", revision, err)
		}
		if err == nil {
			last = r
			a.reportRollout(r, told)
			if r.Waiting == 0 {
				if !slices.ContainsFunc(r.Hosts, func(h apitypes.RolloutHost) bool { return h.Connected }) {
					say(a.env.Err, "no host is connected now")
				}
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return withHint(fmt.Errorf("revision %d was applied, but within %v these hosts did not get it: %s", revision, timeout, missing(last)), "see: signet node list")
		case <-tick.C:
		}
	}
}

func (a *app) reportRollout(r apitypes.Rollout, told map[string]string) {
	done, connected := 0, 0
	for _, h := range r.Hosts {
		if h.Connected {
			connected++
			if h.Done {
				done++
			}
		}
	}
	for _, h := range r.Hosts {
		state := "waiting"
		switch {
		case h.Error != "":
			state = "failed: " + h.Error
		case h.Done:
			state = "applied"
		case !h.Connected:
			state = "not connected; it gets the revision when it comes back"
		}
		if told[h.Node] == state || state == "waiting" {
			continue
		}
		told[h.Node] = state
		say(a.env.Err, "%s: %s (%d of %d connected hosts)", h.Node, state, done, connected)
	}
}

func missing(r apitypes.Rollout) string {
	var names []string
	for _, h := range r.Hosts {
		if h.Connected && !h.Done {
			names = append(names, h.Node)
		}
	}
	if len(names) == 0 {
		return "unknown"
	}
	return strings.Join(names, ", ")
}
