package api

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
)

func TestNodes(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.enrol("api-1", true)
	b.enrol("stray", false)
	b.sessions["api-1"] = epoch.Add(time.Minute)
	var list apitypes.NodeList
	b.get("nodes", &list)
	if len(list.Nodes) != 2 || list.Nodes[0].Name != "api-1" || !list.Nodes[0].Connected || len(list.Nodes[0].Workloads) != 2 || list.Nodes[1].Status != "pending" ||
		list.Nodes[1].Workloads == nil {
		t.Fatalf("nodes %+v", list.Nodes)
	}
	b.do("POST", "nodes/stray/approve", "", 204, nil)
	var n apitypes.Node
	b.get("nodes/stray", &n)
	if n.Status != "active" || n.ID != "spiffe://settler.example/signet/node/stray" || n.Key == "" || !n.IPv4.IsValid() {
		t.Errorf("node %+v", n)
	}
	b.do("POST", "nodes/stray/revoke", "", 204, nil)
	b.get("nodes/stray", &n)
	if n.Status != "revoked" {
		t.Errorf("status %s", n.Status)
	}
	b.refused(b.send(ask{method: "POST", path: "nodes/stray/approve", token: "owner" + tail}), 409, apitypes.CodeConflict)
	b.refused(b.send(ask{method: "POST", path: "nodes/nobody/revoke", token: "owner" + tail}), 404, apitypes.CodeNotFound)
	b.refused(b.send(ask{method: "GET", path: "nodes/nobody", token: "owner" + tail}), 404, apitypes.CodeNotFound)
}

func TestPages(t *testing.T) {
	b := newBench(t)
	for i := range 7 {
		b.enrol(fmt.Sprintf("n-%d", i), true)
	}
	var names []string
	cursor, pages := "", 0
	for {
		var list apitypes.NodeList
		b.get("nodes?limit=3&cursor="+cursor, &list)
		for _, n := range list.Nodes {
			names = append(names, n.Name)
		}
		pages++
		if cursor = list.NextCursor; cursor == "" {
			break
		}
	}
	if pages != 3 || strings.Join(names, " ") != "n-0 n-1 n-2 n-3 n-4 n-5 n-6" {
		t.Errorf("%d pages: %v", pages, names)
	}
}

func TestJoinTokens(t *testing.T) {
	b := newBench(t)
	var token apitypes.JoinToken
	b.do("POST", "join-tokens", `{"node":"api-*","ttl":"30m","uses":3}`, http.StatusCreated, &token)
	if token.Token == "" || token.Node != "api-*" || !token.Expires.Equal(epoch.Add(30*time.Minute)) {
		t.Errorf("token for %s until %v", token.Node, token.Expires)
	}
	if _, err := identity.ParseJoinToken(token.Token); err != nil {
		t.Error(err)
	}
	if strings.Contains(b.log.String(), token.Token) {
		t.Error("the log holds the join token")
	}
	for _, r := range b.audited(0) {
		if strings.Contains(fmt.Sprint(r), token.Token) {
			t.Error("the audit log holds the join token")
		}
	}
	for _, body := range []string{`{"ttl":"x"}`, `{"ttl":"-1h"}`, `{"ttl":"0s"}`, `{"ttl":"9000h"}`, `{"uses":0}`, `{"uses":-1}`, `{"uses":100001}`, `{"node":"a/b"}`, `{"node":"a b"}`, `{"node":"[a"}`, `{"replace":true}`} {
		w := b.send(ask{method: "POST", path: "join-tokens", body: body, token: "operator" + tail})
		b.refused(w, 422, apitypes.CodeInvalid)
	}
}

func TestWorkloads(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.enrol("api-1", true)
	var list apitypes.WorkloadList
	b.get("workloads", &list)
	if len(list.Workloads) != 3 || list.Workloads[0].ID != "spiffe://settler.example/app/api-server" || len(list.Workloads[0].Instances) != 1 || list.Workloads[2].Instances == nil {
		t.Fatalf("workloads %+v", list.Workloads)
	}
	var wl apitypes.Workload
	b.get("workloads/data/postgres", &wl)
	if wl.Name != "postgres" || wl.Zone != "data" || !wl.Declared || wl.Serves[0] != "tcp/5432" || wl.Selectors[0] != "unit:postgresql.service" || len(wl.Instances) != 0 {
		t.Errorf("workload %+v", wl)
	}
	var r apitypes.Resolution
	b.get("resolve?id=app/api-server", &r)
	if len(r.Instances) != 1 || r.Instances[0].Node != "api-1" || len(r.Instances[0].Addresses) != 2 || r.Number < 256 {
		t.Errorf("resolved %+v", r)
	}
	b.get("resolve?id=spiffe://settler.example/app/api-server", &r)
	b.refused(b.send(ask{method: "GET", path: "resolve?id=spiffe://other.example/app/api-server", token: "owner" + tail}), 422, apitypes.CodeInvalid)
	b.refused(b.send(ask{method: "GET", path: "workloads/app/nobody", token: "owner" + tail}), 404, apitypes.CodeNotFound)
	b.refused(b.send(ask{method: "GET", path: "workloads/signet/node", token: "owner" + tail}), 422, apitypes.CodeInvalid)

	b.do("POST", "workloads/app/api-server/revoke", `{"node":"api-1"}`, 204, nil)
	b.get("workloads/app/api-server", &wl)
	if !wl.Instances[0].Revoked {
		t.Errorf("not revoked: %+v", wl.Instances)
	}
	b.do("POST", "workloads/app/webhook/revoke", "", 204, nil)
	b.refused(b.send(ask{method: "POST", path: "workloads/app/nobody/revoke", token: "owner" + tail}), 404, apitypes.CodeNotFound)
	b.refused(b.send(ask{method: "POST", path: "workloads/app/webhook/revoke", body: `{"node":"nobody"}`, token: "owner" + tail}), 404, apitypes.CodeNotFound)
	b.refused(b.send(ask{method: "POST", path: "workloads/data/postgres/revoke", body: `{"node":"api-1"}`, token: "owner" + tail}), 404, apitypes.CodeNotFound)
}

func TestExplain(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.enrol("api-1", true)
	b.enrol("db-1", true)
	var x apitypes.Explanation
	b.do("POST", "explain", `{"from":"app/api-server","to":"data/postgres","port":"tcp/5432"}`, 200, &x)
	if x.Verdict != "allow" || x.Code != "POLICY_ALLOW" || x.Rule != "api-to-postgres" || x.PolicyRevision != 1 || x.From.Node != "api-1" || x.From.Number < 256 || x.Nearest == nil {
		t.Errorf("%+v", x)
	}
	b.do("POST", "explain", `{"from":"app/webhook","to":"spiffe://settler.example/data/postgres","port":"tcp/5432"}`, 200, &x)
	if x.Verdict != "deny" || x.Code != "NO_RULE" || x.Remedy == "" || len(x.Nearest) != 1 || x.Nearest[0].Rule != "api-to-postgres" || x.Stage == "" || x.Observed == "" || x.Expected == "" {
		t.Errorf("%+v", x)
	}
	for _, body := range []string{
		`{"from":"x","to":"data/postgres","port":"tcp/1"}`, `{"from":"app/webhook","to":"data/postgres","port":"tcp"  ,"x":1}`,
		`{"from":"app/webhook","to":"data/postgres","port":"tcp/0"}`, `{"from":"app/webhook","to":"data/postgres"}`,
		`{"from":"spiffe://other.example/app/webhook","to":"data/postgres","port":"tcp/1"}`,
	} {
		b.refused(b.send(ask{method: "POST", path: "explain", body: body, token: "viewer" + tail}), 422, apitypes.CodeInvalid)
	}
}

func TestStatsAndAudit(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.enrol("api-1", true)
	b.sessions["api-1"] = epoch
	var s apitypes.Stats
	b.get("stats", &s)
	if s.TrustDomain != "settler.example" || s.PolicyRevision != 1 || s.Nodes["active"] != 1 || s.Nodes["connected"] != 1 || s.Workloads != 3 || s.Instances != 2 || s.Rules != 1 || s.Version != "test" {
		t.Errorf("%+v", s)
	}
	var v apitypes.AuditVerification
	b.get("audit/verify", &v)
	var all apitypes.AuditList
	b.get("audit?limit=1000", &all)
	if !v.OK || int(v.Records) != len(all.Records) || v.Head != all.Records[len(all.Records)-1].Hash {
		t.Errorf("%+v of %d records", v, len(all.Records))
	}
	var some []apitypes.AuditRecord
	cursor := ""
	for {
		var page apitypes.AuditList
		b.get("audit?limit=2&cursor="+cursor, &page)
		some = append(some, page.Records...)
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if len(some) != len(all.Records) || some[len(some)-1].Seq != all.Records[len(all.Records)-1].Seq {
		t.Errorf("pages give %d records, want %d", len(some), len(all.Records))
	}
}

// TestChangesAreAudited: every mutating route leaves a record under the token's id, whether it worked or not.
func TestChangesAreAudited(t *testing.T) {
	b := newBench(t)
	b.enrol("stray", false)
	for _, c := range []struct {
		name, method, path, body, outcome string
	}{
		{"apply", "PUT", "policy", policyBody(t, goodPolicy), "ok"},
		{"apply a bad one", "PUT", "policy", policyBody(t, "rules: [{}]"), "failed"},
		{"apply again", "PUT", "policy", policyBody(t, goodPolicy), "ok"},
		{"rollback", "POST", "policy/rollback", "", "ok"},
		{"rollback to nowhere", "POST", "policy/rollback", `{"revision":99}`, "failed"},
		{"approve", "POST", "nodes/stray/approve", "", "ok"},
		{"approve nobody", "POST", "nodes/nobody/approve", "", "failed"},
		{"revoke workload", "POST", "workloads/app/webhook/revoke", "", "ok"},
		{"revoke a workload that is not there", "POST", "workloads/app/nobody/revoke", "", "failed"},
		{"revoke a workload where it is not", "POST", "workloads/data/postgres/revoke", `{"node":"stray"}`, "failed"},
		{"revoke node", "POST", "nodes/stray/revoke", "", "ok"},
		{"join token", "POST", "join-tokens", "{}", "ok"},
		{"impossible join token", "POST", "join-tokens", `{"node":"a/b"}`, "failed"},
	} {
		all := b.audited(0)
		b.send(ask{method: c.method, path: c.path, body: c.body, token: "owner" + tail, remote: "192.0.2.7:1"})
		got := b.audited(all[len(all)-1].Seq)
		if len(got) != 1 || got[0].Who != "token:owner" || got[0].Outcome != c.outcome {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
}

func TestRollout(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.enrol("api-1", true)
	b.enrol("db-1", true)
	b.enrol("gone", true)
	b.do("POST", "nodes/gone/revoke", "", 204, nil)
	b.sessions["api-1"], b.sessions["db-1"] = epoch, epoch
	report := func(node string, r registry.AppliedReport) {
		t.Helper()
		if err := b.registry.Applied(context.Background(), node, r); err != nil {
			t.Fatal(err)
		}
	}
	report("api-1", registry.AppliedReport{PolicyRevision: 1})
	var r apitypes.Rollout
	b.get("policy/revisions/1/rollout", &r)
	if r.Waiting != 1 || len(r.Hosts) != 2 || !r.Hosts[0].Done || r.Hosts[0].Applied.IsZero() || r.Hosts[1].Done {
		t.Errorf("%+v", r)
	}
	delete(b.sessions, "db-1")
	b.get("policy/revisions/1/rollout", &r)
	if r.Waiting != 0 || r.Hosts[1].Connected {
		t.Errorf("a host that is away is waited for: %+v", r)
	}
	for _, n := range []string{"0", "2", "99999999"} {
		b.refused(b.send(ask{method: "GET", path: "policy/revisions/" + n + "/rollout", token: "viewer" + tail}), 404, apitypes.CodeNotFound)
	}
}
