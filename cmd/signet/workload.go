package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/internal/identity"
)

func (a *app) workloadCommand() *cobra.Command {
	return a.parent("workload", "Workloads and where they are placed", "  signet workload list\n  signet workload show data/postgres", groupAdmin,
		a.leaf(command{
			use: "list", short: "List workloads: of the whole mesh, or of this host where no API is named",
			example: "  signet workload list\n  signet workload list -o json", run: a.workloadList,
		}),
		a.leaf(command{
			use: "show ID", short: "Show a workload", example: "  signet workload show data/postgres", args: exactly("ID"), run: a.workloadShow,
		}),
		a.workloadRevokeCommand(),
	)
}

// shortID reads zone/workload or a whole SPIFFE ID. The trust domain of the second is not known here, and not checked.
func shortID(s string) (string, error) {
	if !strings.Contains(s, "://") {
		td, err := identity.ParseTrustDomain("any")
		if err != nil {
			return "", err
		}
		id, err := td.ParseShort(s)
		return id.Short(), err
	}
	id, err := identity.ParseID(s)
	if err != nil {
		return "", err
	}
	if strings.Count(id.Path(), "/") != 2 {
		return "", fmt.Errorf("%q names no workload", s)
	}
	return id.Short(), nil
}

func (a *app) workloadList(ctx context.Context, args []string) error {
	has, err := a.hasAPI()
	if err != nil {
		return err
	}
	if !has {
		return a.localWorkloads(ctx, args)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	list, err := c.Workloads(ctx)
	if err != nil {
		return err
	}
	return a.print(apitypes.WorkloadList{Workloads: list}, func(w io.Writer) {
		row(w, "WORKLOAD", "NUMBER", "NODE", "ADDRESSES", "STATE")
		for _, wl := range list {
			name := wl.Zone + "/" + wl.Name
			if len(wl.Instances) == 0 {
				row(w, name, wl.Number, "", "", "placed on no node")
			}
			for _, i := range wl.Instances {
				row(w, name, wl.Number, i.Node, join(i.Addresses), instanceState(wl, i))
			}
		}
	})
}

func instanceState(wl apitypes.Workload, i apitypes.Instance) string {
	switch {
	case i.Revoked:
		return "revoked"
	case !wl.Declared:
		return "no longer declared"
	}
	return "placed"
}

func (a *app) workloadShow(ctx context.Context, args []string) error {
	id, err := short(args[0])
	if err != nil {
		return err
	}
	has, err := a.hasAPI()
	if err != nil {
		return err
	}
	if !has {
		return a.localWorkloadShow(ctx, id)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	wl, err := c.Workload(ctx, id)
	if err != nil {
		return err
	}
	return a.print(wl, func(w io.Writer) {
		row(w, "id:", wl.ID)
		row(w, "number:", wl.Number)
		row(w, "declared:", yes(wl.Declared))
		row(w, "selectors:", strings.Join(wl.Selectors, ", "))
		row(w, "nodes:", strings.Join(wl.Nodes, ", "))
		row(w, "serves:", strings.Join(wl.Serves, ", "))
		for _, i := range wl.Instances {
			row(w, "on "+i.Node+":", join(i.Addresses)+"  "+instanceState(wl, i))
		}
	})
}

func (a *app) localWorkloadShow(ctx context.Context, id string) error {
	list, err := a.agent().Workloads(ctx)
	if err != nil {
		return err
	}
	for _, wl := range list {
		if wl.ID.Short() == id {
			return a.print(wl, func(w io.Writer) { localWorkloadTable(w, []localapi.Workload{wl}) })
		}
	}
	return withHint(fmt.Errorf("this host has no workload %s", id), "name the coordinator's API to ask about the whole mesh")
}

func (a *app) workloadRevokeCommand() *cobra.Command {
	var node string
	c := a.leaf(command{
		use: "revoke ID", short: "Cut a workload's live flows and certificates, on one node or on all",
		example: "  signet workload revoke app/webhook\n  signet workload revoke app/webhook --node api-1", args: exactly("ID"),
		run: func(ctx context.Context, args []string) error {
			id, err := short(args[0])
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if err := c.RevokeWorkload(ctx, id, node); err != nil {
				return err
			}
			where := "on every node"
			if node != "" {
				where = "on " + node
			}
			return a.done(outcome{Workload: id, Node: node, Done: "revoked"}, "%s is revoked %s", id, where)
		},
	})
	c.Flags().StringVar(&node, "node", "", "only on this node")
	return c
}

// resolved is the answer of resolve, whoever gave it.
type resolved struct {
	ID        string             `json:"id"`
	Instances []resolvedInstance `json:"instances"`
}

type resolvedInstance struct {
	Node      string       `json:"node"`
	Addresses []netip.Addr `json:"addresses"`
}

func (a *app) resolveCommand() *cobra.Command {
	var hosts bool
	c := a.leaf(command{
		use: "resolve ID", short: "Overlay addresses of a workload, from the API or, where none is named, from this host's agent", group: groupLocal,
		example: "  signet resolve data/postgres\n  signet resolve data/postgres --hosts-file >> /etc/hosts", args: exactly("ID"),
		run: func(ctx context.Context, args []string) error {
			r, err := a.resolve(ctx, args[0])
			if err != nil {
				return err
			}
			if hosts {
				return a.hostsLines(r)
			}
			return a.print(r, func(w io.Writer) {
				row(w, "NODE", "ADDRESSES")
				for _, i := range r.Instances {
					row(w, i.Node, join(i.Addresses))
				}
			})
		},
	})
	c.Flags().BoolVar(&hosts, "hosts-file", false, "print lines for a hosts file, each marked with the workload")
	return c
}

func (a *app) resolve(ctx context.Context, id string) (resolved, error) {
	if _, err := short(id); err != nil {
		return resolved{}, err
	}
	has, err := a.hasAPI()
	if err != nil {
		return resolved{}, err
	}
	if !has {
		r, err := a.agent().Resolve(ctx, id)
		out := resolved{ID: r.ID.String(), Instances: []resolvedInstance{}}
		for _, i := range r.Instances {
			out.Instances = append(out.Instances, resolvedInstance{i.Node, i.Addresses})
		}
		return out, err
	}
	c, err := a.client()
	if err != nil {
		return resolved{}, err
	}
	r, err := c.Resolve(ctx, id)
	out := resolved{ID: r.ID, Instances: []resolvedInstance{}}
	for _, i := range r.Instances {
		if !i.Revoked {
			out.Instances = append(out.Instances, resolvedInstance{i.Node, i.Addresses})
		}
	}
	return out, err
}

// hostsLines prints workload.zone.trust-domain. What answered is not trusted with the form of a line: the ID is parsed
// again, and a name that is no host name is refused.
func (a *app) hostsLines(r resolved) error {
	id, err := identity.ParseID(r.ID)
	if err != nil {
		return err
	}
	zone, name, _ := strings.Cut(id.Short(), "/")
	host := name + "." + zone + "." + id.TrustDomain().String()
	for _, label := range strings.Split(host, ".") {
		if !isLabel(label) {
			return fmt.Errorf("%s is not a host name: %q is no DNS label of a-z 0-9 -", host, label)
		}
	}
	if len(r.Instances) == 0 {
		return fmt.Errorf("%s has no address now", id.Short())
	}
	for _, i := range r.Instances {
		for _, addr := range i.Addresses {
			if _, err := fmt.Fprintf(a.env.Out, "%s\t%s\t# signet %s on %s\n", addr.WithZone(""), host, id.Short(), safe(i.Node)); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
	}
	return nil
}

func isLabel(s string) bool {
	if s == "" || len(s) > identity.MaxNameLength || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
