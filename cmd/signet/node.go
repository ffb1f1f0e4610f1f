package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

func (a *app) nodeCommand() *cobra.Command {
	return a.parent("node", "Enrolled hosts and the tokens that they join with", "  signet node list\n  signet node approve api-1", groupAdmin,
		a.parent("token", "Tokens that hosts join with", "  signet node token create --node api-1", "", a.tokenCreateCommand()),
		a.leaf(command{use: "list", short: "List nodes", example: "  signet node list\n  signet node list -o json", run: a.nodeList}),
		a.leaf(command{use: "show NAME", short: "Show a node", example: "  signet node show api-1", args: exactly("NAME"), run: a.nodeShow}),
		a.leaf(command{use: "approve NAME", short: "Let a pending node have its workloads", example: "  signet node approve api-1", args: exactly("NAME"), run: a.nodeApprove}),
		a.leaf(command{
			use: "revoke NAME", short: "Take a node back, for good: its key and name stay refused", example: "  signet node revoke api-1",
			args: exactly("NAME"), run: a.nodeRevoke,
		}),
	)
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var r apitypes.JoinTokenRequest
	var ttl time.Duration
	var c *cobra.Command
	c = a.leaf(command{
		use: "create", short: "Make a join token; prints the token and nothing else",
		long: "Make a join token. A token for a name, or a glob, binds the name of the node that joins with it; with any other the\n" +
			"node is pending, without workloads, until it is approved.",
		example: "  signet node token create --node api-1 > join.token\n  signet node token create --node 'api-*' --uses 10 --ttl 24h\n  signet node token create --node db-1 --replace",
		run: func(ctx context.Context, _ []string) error {
			if err := refuseFlags(c, "ephemeral"); err != nil {
				return err
			}
			if r.Uses < 1 || ttl <= 0 {
				return usagef("--uses and --ttl must be more than nothing")
			}
			r.TTL = ttl.String()
			return a.tokenCreate(ctx, r)
		},
	})
	c.Flags().StringVar(&r.Node, "node", "", "name or glob that the token binds")
	c.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token may be used")
	c.Flags().IntVar(&r.Uses, "uses", 1, "how many hosts may join with it")
	c.Flags().BoolVar(&r.Ephemeral, "ephemeral", false, "hosts that joined with it are removed when they stay away (not built yet)")
	c.Flags().BoolVar(&r.Replace, "replace", false, "a host may take the place of an existing node of that name; needs --node")
	return c
}

func (a *app) tokenCreate(ctx context.Context, r apitypes.JoinTokenRequest) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	token, err := c.CreateJoinToken(ctx, r)
	if err != nil {
		return err
	}
	return a.print(token, func(w io.Writer) { say(w, "%s", token.Token) })
}

func (a *app) nodeList(ctx context.Context, _ []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return err
	}
	return a.print(apitypes.NodeList{Nodes: nodes}, func(w io.Writer) {
		row(w, "NODE", "STATUS", "CONNECTED", "LAST SEEN", "POLICY", "ADDRESSES", "WORKLOADS")
		for _, n := range nodes {
			row(w, n.Name, n.Status, yes(n.Connected), when(n.LastSeen), n.PolicyRevision, nodeAddresses(n), len(n.Workloads))
		}
	})
}

func nodeAddresses(n apitypes.Node) string {
	switch {
	case n.IPv4.IsValid() && n.IPv6.IsValid():
		return n.IPv4.String() + ", " + n.IPv6.String()
	case n.IPv4.IsValid():
		return n.IPv4.String()
	case n.IPv6.IsValid():
		return n.IPv6.String()
	}
	return ""
}

func (a *app) nodeShow(ctx context.Context, args []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	n, err := c.Node(ctx, args[0])
	if err != nil {
		return err
	}
	return a.print(n, func(w io.Writer) {
		row(w, "node:", n.Name)
		row(w, "id:", n.ID)
		row(w, "number:", n.Number)
		row(w, "status:", n.Status)
		row(w, "connected:", yes(n.Connected))
		row(w, "last seen:", when(n.LastSeen))
		row(w, "policy revision:", n.PolicyRevision)
		row(w, "addresses:", nodeAddresses(n))
		row(w, "key:", n.Key)
		row(w, "created:", when(n.Created))
		for _, id := range n.Workloads {
			row(w, "workload:", id)
		}
	})
}

// outcome is what commands that change one thing print for machines.
type outcome struct {
	Node     string `json:"node,omitempty"`
	Workload string `json:"workload,omitempty"`
	Done     string `json:"done"`
}

func (a *app) nodeApprove(ctx context.Context, args []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if err := c.ApproveNode(ctx, args[0]); err != nil {
		return err
	}
	return a.done(outcome{Node: args[0], Done: "approved"}, "%s is approved", args[0])
}

func (a *app) nodeRevoke(ctx context.Context, args []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if err := c.RevokeNode(ctx, args[0]); err != nil {
		return err
	}
	return a.done(outcome{Node: args[0], Done: "revoked"}, "%s is revoked: its key and name stay refused", args[0])
}

// short reads zone/workload or a whole SPIFFE ID into zone/workload, the form of paths.
func short(id string) (string, error) {
	s, err := shortID(id)
	if err != nil {
		return "", usageError{fmt.Errorf("%w; expected zone/workload", err)}
	}
	return s, nil
}
