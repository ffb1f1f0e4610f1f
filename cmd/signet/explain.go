package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/internal/policy"
)

func (a *app) explainCommand() *cobra.Command {
	var r apitypes.ExplainRequest
	var c *cobra.Command
	c = a.leaf(command{
		use: "explain", short: "Would it work, and why (not)", group: groupAdmin,
		example: "  signet explain --from app/api-server --to data/postgres --port tcp/5432\n  signet explain --from app/webhook --to data/postgres --port tcp/5432 -o json",
		run: func(ctx context.Context, _ []string) error {
			if err := refuseFlags(c, "pid", "unit", "flow", "cert", "bundle", "audience"); err != nil {
				return err
			}
			// Alone, --token-file names the token to look into; beside --from and --to it is the API's.
			if r == (apitypes.ExplainRequest{}) && c.Flags().Changed("token-file") {
				return notBuilt("signet explain --token-file")
			}
			if r.From == "" || r.To == "" || r.Port == "" {
				return usagef("explain needs --from ID, --to ID and --port such as tcp/5432")
			}
			if _, err := policy.ParseService(r.Port); err != nil {
				return usageError{err}
			}
			return a.explain(ctx, r)
		},
	})
	f := c.Flags()
	f.StringVar(&r.From, "from", "", "workload that opens the connection: zone/name or a SPIFFE ID")
	f.StringVar(&r.To, "to", "", "workload that is asked")
	f.StringVar(&r.Port, "port", "", "tcp/5432, udp/53 or icmp")
	for name, what := range map[string]string{
		"pid": "why this process has (no) identity", "unit": "why this systemd unit has (no) identity", "flow": "why this flow was allowed or denied",
		"cert": "what is wrong with this certificate chain", "bundle": "check against this bundle", "audience": "audience that a token is for",
	} {
		f.String(name, "", what+" (not built yet)")
	}
	return c
}

func (a *app) explain(ctx context.Context, r apitypes.ExplainRequest) error {
	c, err := a.client()
	if errors.Is(err, errNoAPI) {
		return a.explainHere(ctx, r)
	}
	if err != nil {
		return err
	}
	x, err := c.Explain(ctx, r)
	if err != nil {
		return err
	}
	return a.print(x, func(w io.Writer) {
		row(w, strings.ToUpper(x.Verdict), fmt.Sprintf("%s at %s, policy revision %d", x.Code, x.Stage, x.PolicyRevision))
		row(w, "from:", explainedEnd(x.From))
		row(w, "to:", explainedEnd(x.To))
		row(w, "service:", x.Service)
		row(w, "rule:", x.Rule)
		row(w, "observed:", x.Observed)
		row(w, "expected:", x.Expected)
		for _, n := range x.Nearest {
			row(w, "nearest:", fmt.Sprintf("%s (%s), but %s", n.Rule, n.At, n.Fails))
		}
		if x.Remedy != "" {
			row(w, "remedy:", x.Remedy)
		}
		for _, warning := range x.Warnings {
			row(w, "warning:", warning)
		}
	})
}

// explainHere asks the agent of this host, which asks a dry-run twin of the judge in force.
func (a *app) explainHere(ctx context.Context, r apitypes.ExplainRequest) error {
	x, err := a.agent().Explain(ctx, localapi.ExplainRequest{From: r.From, To: r.To, Port: r.Port})
	if err != nil {
		return err
	}
	return a.print(x, func(w io.Writer) {
		row(w, strings.ToUpper(x.Verdict.String()), fmt.Sprintf("%v at %s, policy revision %d", x.Code, x.Stage, x.PolicyRevision))
		for _, end := range []struct {
			label string
			localapi.ExplainedEnd
		}{{"from:", x.From}, {"to:", x.To}} {
			row(w, end.label, explainedEnd(apitypes.Peer{ID: end.ID.String(), Number: uint32(end.Number), Node: end.Node}))
		}
		row(w, "service:", x.Service)
		row(w, "rule:", x.Rule)
		row(w, "observed:", x.Observed)
		row(w, "expected:", x.Expected)
		for _, n := range x.Nearest {
			row(w, "nearest:", fmt.Sprintf("%s, but %s", n.Rule, n.Fails))
		}
		for _, h := range x.Hooks {
			row(w, h.Hook+":", strings.TrimSpace(fmt.Sprintf("%v %v %s", h.Verdict, h.Code, h.Rule)))
		}
		if x.Remedy != "" {
			row(w, "remedy:", x.Remedy)
		}
		for _, warning := range x.Warnings {
			row(w, "warning:", warning)
		}
	})
}

func explainedEnd(p apitypes.Peer) string {
	where := "on no active node"
	if len(p.Nodes) > 0 {
		where = "on " + strings.Join(p.Nodes, ", ")
	} else if p.Node != "" {
		where = "on " + p.Node
	}
	return fmt.Sprintf("%s  number %d, %s", p.ID, p.Number, where)
}
