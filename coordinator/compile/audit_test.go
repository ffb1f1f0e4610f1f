package compile

import (
	"strings"
	"testing"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

const rulesInAudit = `rules:
- {id: all, from: [app/a], to: [app/b], allow: [tcp]}
- {id: dry, from: [app/a], to: [app/b], deny: [tcp/20-30], mode: audit}
- {id: soft, from: [app/b], to: [app/a], allow: [sctp/1-65535], mode: audit, expires: 2027-01-31T12:00:00Z}
- {id: no-7, from: [app/b], to: [app/a], deny: [sctp/7]}
tests:
- {from: app/a, to: app/b, port: tcp/22, expect: allow}
- {from: app/b, to: app/a, port: sctp/5, expect: deny}
- {from: app/b, to: app/a, port: sctp/7, expect: deny}
`

func TestExplainAudit(t *testing.T) {
	s := Candidate(mustDoc(t, header("app/a", "app/b")+rulesInAudit))
	c := mustCompile(t, s)
	for _, row := range []struct {
		from, to, port string
		verdict        flow.Verdict
		code           flow.Reason
		rule, stage    string
		observed       string
	}{
		{"app/a", "app/b", "tcp/22", flow.Audit, flow.PolicyDeny, "dry", "egress", "rule dry would deny tcp/22 from app/a to app/b; it is in mode audit, so that the flow passes and is recorded with event audit"},
		{"app/a", "app/b", "tcp/31", flow.Allow, flow.PolicyAllow, "all", "ingress", "rule all allows tcp/31 from app/a to app/b"},
		{"app/a", "app/b", "tcp", flow.Audit, flow.PolicyDeny, "dry", "egress", "rule dry would deny tcp from app/a to app/b; it is in mode audit, so that the flow passes and is recorded with event audit"},
		{"app/a", "app/b", "tcp/1-19", flow.Allow, flow.PolicyAllow, "all", "ingress", "rule all allows tcp/1-19 from app/a to app/b"},
		{"app/a", "app/b", "tcp/30-40", flow.Audit, flow.PolicyDeny, "dry", "egress", "rule dry would deny tcp/30-40 from app/a to app/b; it is in mode audit, so that the flow passes and is recorded with event audit"},
		{"app/b", "app/a", "sctp/5", flow.Audit, flow.Expired, "soft", "egress", "rule soft has expired and would withhold sctp/5 from app/b to app/a; it is in mode audit, so that the flow passes and is recorded with event audit"},
		{"app/b", "app/a", "sctp/7", flow.Deny, flow.PolicyDeny, "no-7", "egress", "rule no-7 denies sctp/7 from app/b to app/a"},
	} {
		x := Explain(s, c, mustID(t, row.from), mustID(t, row.to), mustService(t, row.port), noon)
		if x.Verdict != row.verdict || x.Code != row.code || x.Rule != row.rule || x.Stage != row.stage || x.Observed != row.observed {
			t.Errorf("%s to %s %s: got %+v", row.from, row.to, row.port, x)
		}
		if x.Verdict == flow.Audit && (x.Expected == "" || !strings.Contains(x.Remedy, "before rule "+row.rule+" (p.yaml:") || x.Nearest == nil) {
			t.Errorf("%s: expected %q, remedy %q", row.port, x.Expected, x.Remedy)
		}
		for _, n := range x.Nearest {
			if n.Rule == "soft" && n.Fails != "deny rule no-7 wins" {
				t.Errorf("an expiry that withholds nothing fails: %+v", n)
			}
		}
	}
}

// TestRunTestsAudit: what passes on record passes for a test, whichever it expects, and the line says so.
func TestRunTestsAudit(t *testing.T) {
	results, err := RunTests(mustDoc(t, header("app/a", "app/b")+rulesInAudit), noon)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{
		"p.yaml:12:4: app/a to app/b on tcp/22: ok, in mode audit; enforced, it would be denied (POLICY_DENY by rule dry)",
		"p.yaml:13:4: app/b to app/a on sctp/5: expected deny, got audit (EXPIRED by rule soft)",
		"p.yaml:14:4: app/b to app/a on sctp/7: ok",
	} {
		if got := results[i].String(); got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
	if x := results[1].Explanation; x == nil || x.Verdict != flow.Audit {
		t.Errorf("got %+v", x)
	}
}

// TestNodeViewTraits: what zones and workloads ask for reaches the node, and the name of a rule that stands only in mode
// audit too.
func TestNodeViewTraits(t *testing.T) {
	s := Candidate(mustDoc(t, `zones: [{name: app}, {name: data, internet: deny}]
workloads:
- {id: app/a, selectors: ["unit:a.service"], nodes: [n]}
- {id: app/b, selectors: ["interface:tap0"], nodes: [n], listen: overlay}
- {id: data/c, selectors: ["container:x=y"], nodes: [n]}
- {id: data/d, selectors: ["unit:d.service"], nodes: [n], listen: overlay}
rules:
- {id: dry, from: [app/a], to: [data/d], deny: [any], mode: audit}
`))
	place(s, "n")
	c := mustCompile(t, s)
	v := c.For("n")
	want := []policy.Traits{{}, {OverlayOnly: true}, {Confined: true}, {Confined: true, OverlayOnly: true}}
	view := c.View("n")
	for i, w := range v.Workloads {
		if w.Traits != want[i] || view.Traits[w.Number] != want[i] {
			t.Errorf("%s: %+v, in the view %+v", w.ID.Short(), w.Traits, view.Traits[w.Number])
		}
	}
	if len(v.Workloads) != 4 || len(view.Traits) != 3 || v.Rules[1] != "dry" {
		t.Errorf("got %+v, %v, rules %v", v.Workloads, view.Traits, v.Rules)
	}
}
