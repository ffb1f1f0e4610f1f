package main

import (
	"strings"
	"testing"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/internal/flow"
)

// TestExplainOnAHost: without an API the agent of this host is asked.
func TestExplainOnAHost(t *testing.T) {
	b := newBench(t)
	b.answers["POST /v1/explain"] = localapi.Explanation{
		Verdict: flow.Deny, Code: flow.NoRule, Stage: "egress", PolicyRevision: 3, Service: "tcp/5433", Observed: "it would be denied", Expected: "an allow rule",
		Nearest: []localapi.Near{{Rule: "api-to-postgres", Action: "allow", Fails: "allow: it does not allow tcp/5433 now"}},
		Hooks:   []localapi.ExplainedHook{{Hook: "connect", Verdict: flow.Deny, Code: flow.NoRule}}, Remedy: "add a rule",
	}
	args := []string{"--socket", b.socket, "explain", "--from", "app/api-server", "--to", "data/postgres", "--port", "tcp/5433"}
	out, errs, code := b.run("", args...)
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, errs)
	}
	for _, want := range []string{"DENY", "NO_RULE at egress, policy revision 3", "connect:", "api-to-postgres, but allow:", "add a rule"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	out, errs, code = b.run("", append(args, "-o", "json")...)
	if code != exitOK || !strings.Contains(out, `"code": "NO_RULE"`) && !strings.Contains(out, `"code":"NO_RULE"`) {
		t.Errorf("exit %d: %s%s", code, errs, out)
	}
}
