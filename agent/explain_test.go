package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// Explain answers by the port that is asked for, and so shows what it was asked.
func (p *fakePlane) Explain(q dataplane.Question) (dataplane.Answer, error) {
	var a dataplane.Answer
	a.View.Revision = 101
	a.Hook = policy.HookConnect
	switch {
	case q.From == nil || q.To != nil || q.Tuple.Src.Addr().IsValid() || q.From.Cgroup == "":
		return a, errors.New("not the question of a process of this host")
	case q.Tuple.Dst.Addr() != sessiontest.Addrs(9)[0]:
		return a, errors.New("not the peer's address")
	case q.Tuple.Dst.Port() == 5432:
		a.Hook = policy.HookEgressDevice
		a.Decision = policy.Decision{Verdict: flow.Allow, Reason: flow.PolicyAllow, Rule: sessiontest.RuleNumber}
	default:
		a.Decision = policy.Decision{Verdict: flow.Deny, Reason: flow.NoRule}
	}
	a.Hooks = append(a.Hooks, a.HookDecision)
	return a, nil
}

// TestExplain: the host answers from its judge's twin, and by itself where there is nothing to ask the judge about.
func TestExplain(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", func(s localapi.Status) bool { return running(s) && len(s.Workloads) == 1 && s.Workloads[0].Matched })
	for _, c := range []struct {
		from, to, port string
		code           flow.Reason
		stage, rule    string
		near           int
	}{
		{"app/api-server", "data/postgres", "tcp/5432", flow.PolicyAllow, "egress", "api-to-postgres", 0},
		{"app/api-server", "data/postgres", "tcp/5433", flow.NoRule, "egress", "", 1},
		{"app/api-server", "data/elsewhere", "tcp/5432", flow.UnknownPeer, "identity", "", 0},
	} {
		x, err := r.client.Explain(t.Context(), localapi.ExplainRequest{From: c.from, To: c.to, Port: c.port})
		if err != nil {
			t.Errorf("%s to %s: %v", c.from, c.to, err)
			continue
		}
		if x.Code != c.code || x.Stage != c.stage || x.Rule != c.rule || x.PolicyRevision != 101 || x.Service != c.port ||
			len(x.Nearest) != c.near || x.Observed == "" || x.Expected == "" || (x.Remedy == "") != (c.code == flow.PolicyAllow) {
			t.Errorf("%s to %s at %s: got %+v", c.from, c.to, c.port, x)
		}
		if x.From.Number != sessiontest.APINumber || x.From.Node != "api-1" || x.From.ID.Short() != c.from || x.To.ID.Short() != c.to {
			t.Errorf("%s to %s: the ends are %+v and %+v", c.from, c.to, x.From, x.To)
		}
	}
	for _, c := range []struct{ from, to, port, code string }{
		{"app/api-server", "data/postgres", "tcp", localapi.CodeInvalid},
		{"app/api-server", "data/postgres", "any", localapi.CodeInvalid},
		{"app/api-server", "data/postgres", "tcp/1-9", localapi.CodeInvalid},
		{"", "data/postgres", "tcp/1", localapi.CodeInvalid},
		{"data/postgres", "data/other", "tcp/1", localapi.CodeNotFound},
	} {
		_, err := r.client.Explain(t.Context(), localapi.ExplainRequest{From: c.from, To: c.to, Port: c.port})
		var e *localapi.Error
		if !errors.As(err, &e) || e.Code != c.code {
			t.Errorf("%+v: got %v", c, err)
		}
	}
}

// TestExplainWithoutAProcess: a workload that nothing on the host is has no identity to send with, and the answer says why.
func TestExplainWithoutAProcess(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now(), "unit:nothing.service"))
	r.start()
	r.until("running", running)
	x, err := r.client.Explain(t.Context(), localapi.ExplainRequest{From: "app/api-server", To: "data/postgres", Port: "tcp/5432"})
	if err != nil || x.Code != flow.NoIdentity || x.Verdict != flow.Deny || !strings.Contains(x.Observed, "no process of this host") {
		t.Errorf("got %+v, %v", x, err)
	}
}
