package policy_test

import (
	"testing"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

func TestJudge(t *testing.T) {
	for _, c := range policytest.Cases() {
		t.Run(c.Name, func(t *testing.T) {
			if err := c.View.Validate(); err != nil {
				t.Fatalf("the case's view: %v", err)
			}
			table := c.Table()
			others := len(table.Conns) - len(c.Conns)
			if got := policy.Judge(c.View, table, c.Packet, c.Now); got != c.Want {
				t.Errorf("got %+v, want %+v", got, c.Want)
			}
			if got, want := len(table.Conns)-others, max(0, c.Tracked); got != want {
				t.Errorf("%d connections are tracked, want %d", got, want)
			}
		})
	}
}

// TestTableIsComplete: every reason and every hook has its case, names are unique, and the table is not thinned out.
func TestTableIsComplete(t *testing.T) {
	cases := policytest.Cases()
	if len(cases) < 120 {
		t.Errorf("%d cases, want at least 120", len(cases))
	}
	names, reasons, hooks := map[string]bool{}, map[flow.Reason]bool{}, map[policy.Hook]bool{}
	for _, c := range cases {
		if names[c.Name] {
			t.Errorf("two cases are called %q", c.Name)
		}
		names[c.Name], reasons[c.Want.Reason], hooks[c.Packet.Hook] = true, true, true
	}
	for _, r := range flow.Reasons() {
		if !reasons[r.Code] {
			t.Errorf("no case gives %v", r.Code)
		}
	}
	for h := policy.HookConnect; h <= policy.HookToWorkload; h++ {
		if !hooks[h] {
			t.Errorf("no case is at hook %d", h)
		}
	}
}
