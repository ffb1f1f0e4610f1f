package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/internal/flow"
)

// flowFilter selects records. What is empty selects all.
type flowFilter struct{ from, to, zone, verdict string }

func (f flowFilter) check() error {
	if f.verdict != "" && !slices.Contains([]string{"allow", "deny", "audit"}, f.verdict) {
		return usagef("%q is not a verdict; expected allow, deny or audit", f.verdict)
	}
	return nil
}

// matches reports whether r is wanted. An end is named by its whole ID, as zone/workload or as zone/*.
func (f flowFilter) matches(r flow.Record) bool {
	return endMatches(f.from, r.Src) && endMatches(f.to, r.Dst) &&
		(f.zone == "" || r.Src.Zone == f.zone || r.Dst.Zone == f.zone) &&
		(f.verdict == "" || r.Verdict.String() == f.verdict)
}

func endMatches(want string, e flow.End) bool {
	if zone, ok := strings.CutSuffix(want, "/*"); ok {
		return e.Zone == zone
	}
	return want == "" || want == e.ID.Short() || want == e.ID.String()
}

func (a *app) flowsCommand() *cobra.Command {
	var f flowFilter
	var follow bool
	var c *cobra.Command
	c = a.leaf(command{
		use: "flows", short: "Show the flows that this host's judge saw; -f goes on as they happen", group: groupLocal,
		example: "  signet flows\n  signet flows -f --verdict deny\n  signet flows -f --to data/postgres -o jsonl",
		run: func(ctx context.Context, _ []string) error {
			if err := refuseFlags(c, "since"); err != nil {
				return err
			}
			if err := f.check(); err != nil {
				return err
			}
			if follow && a.flags.output == formatJSON {
				return usagef("-f never ends, so it is no JSON document; use -o jsonl")
			}
			return a.flows(ctx, f, follow)
		},
	})
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	c.Flags().StringVar(&f.from, "from", "", "only from this workload: zone/name, zone/* or a SPIFFE ID")
	c.Flags().StringVar(&f.to, "to", "", "only to this workload")
	c.Flags().StringVar(&f.zone, "zone", "", "only with an end in this zone")
	c.Flags().StringVar(&f.verdict, "verdict", "", "only allow, deny or audit")
	c.Flags().String("since", "", "recorded flows of the whole mesh (not built yet)")
	return c
}

func (a *app) flows(ctx context.Context, f flowFilter, follow bool) error {
	all := []flow.Record{}
	if a.flags.output == formatTable {
		say(a.env.Out, "%s", "TIME                  EVENT  VERDICT  FROM -> TO  PROTO  REASON")
	}
	err := a.agent().Flows(ctx, follow, func(r flow.Record) error {
		switch {
		case !f.matches(r):
			return nil
		case a.flags.output == formatJSON:
			all = append(all, r)
			return nil
		}
		return a.flowLine(r)
	})
	if err != nil || a.flags.output != formatJSON {
		return err
	}
	return a.print(all, func(io.Writer) {})
}

// flowLine writes one record at once: who watches a stream wants no buffer.
func (a *app) flowLine(r flow.Record) error {
	if a.flags.output == formatJSONL {
		if err := encode(a.env.Out, r, ""); err != nil {
			return fmt.Errorf("write flow record: %w", err)
		}
		return nil
	}
	why := r.Reason.String()
	if r.Rule != "" {
		why += " (" + r.Rule + ")"
	}
	line := safe(fmt.Sprintf("%s  %-5s  %-7s  %s -> %s  %s  %s", when(r.Time), r.Event, r.Verdict, endText(r.Src), endText(r.Dst), r.Proto, why))
	if r.LostBefore > 0 {
		line += fmt.Sprintf("  [%d records lost before]", r.LostBefore)
	}
	if _, err := fmt.Fprintln(a.env.Out, line); err != nil {
		return fmt.Errorf("write flow record: %w", err)
	}
	return nil
}

func endText(e flow.End) string {
	who := e.ID.Short()
	if who == "" {
		who = "unknown"
	}
	if !e.IP.IsValid() {
		return who
	}
	return fmt.Sprintf("%s (%s:%d)", who, e.IP, e.Port)
}
