package compile

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

const rulesForExplain = `rules:
- {id: db, from: [app/api], to: [data/db], allow: [tcp/5432]}
- {id: old, from: [app/hook], to: [data/db], allow: [tcp/5432], expires: 2027-01-31T12:00:00Z}
- {id: cache, from: [app/*], to: [data/redis], allow: [tcp/6379]}
- {id: no-cache, from: [app/hook], to: [data/redis], deny: [any]}
- {id: metrics, from: [app/api], to: [data/redis], allow: [udp/53]}
`

func explainState(t *testing.T) (*registry.State, *Compiled) {
	t.Helper()
	s := Candidate(mustDoc(t, header("app/api", "app/hook", "data/db", "data/redis")+rulesForExplain))
	s.PolicyRevision = 17
	return s, mustCompile(t, s)
}

func TestExplain(t *testing.T) {
	s, c := explainState(t)
	for _, row := range []struct {
		from, to, port string
		verdict        flow.Verdict
		code           flow.Reason
		rule, stage    string
		remedy         string
		nearest        string
	}{
		{"app/api", "data/db", "tcp/5432", flow.Allow, flow.PolicyAllow, "db", "ingress", "", ""},
		{"app/api", "data/db", "tcp/5433", flow.Deny, flow.NoRule, "", "egress", "add tcp/5433 to allow of rule db (p.yaml:10:4), then run: signet policy apply FILE",
			"db(allow: tcp/5433 is not in [tcp/5432]) old(from: app/api is not in [app/hook]) cache(to: data/db is not in [data/redis])"},
		{"data/db", "app/api", "tcp/5432", flow.Deny, flow.NoRule, "", "egress",
			"add a rule {id: NAME, from: [data/db], to: [app/api], allow: [tcp/5432]}, then run: signet policy apply FILE", ""},
		{"app/hook", "data/db", "tcp/5432", flow.Deny, flow.Expired, "old", "egress", "change expires of rule old (p.yaml:11:4), then run: signet policy apply FILE",
			"old(expires: it expired at 2027-01-31T12:00:00Z) db(from: app/hook is not in [app/api]) cache(to: data/db is not in [data/redis])"},
		{"app/hook", "data/redis", "tcp/6379", flow.Deny, flow.PolicyDeny, "no-cache", "egress", "change or remove deny rule no-cache (p.yaml:13:4), then run: signet policy apply FILE",
			"cache(deny rule no-cache wins) old(to: data/redis is not in [data/db]) metrics(from: app/hook is not in [app/api])"},
		{"app/gone", "data/redis", "tcp/6379", flow.Deny, flow.NoIdentity, "", "identity", "declare app/gone under workloads, then run: signet policy apply FILE", ""},
		{"app/api", "data/gone", "icmp", flow.Deny, flow.UnknownPeer, "", "identity", "declare data/gone under workloads, then run: signet policy apply FILE", ""},
	} {
		x := Explain(s, c, mustID(t, row.from), mustID(t, row.to), mustService(t, row.port), noon)
		var near []string
		for _, n := range x.Nearest {
			near = append(near, n.Rule+"("+n.Fails+")")
		}
		if x.Verdict != row.verdict || x.Code != row.code || x.Rule != row.rule || x.Stage != row.stage || x.Remedy != row.remedy ||
			strings.Join(near, " ") != row.nearest || x.PolicyRevision != 17 || x.Observed == "" || x.Expected == "" {
			t.Errorf("%s to %s %s:\n%+v\n%s", row.from, row.to, row.port, x, strings.Join(near, " "))
		}
	}
}

// TestExplainJSON keeps the keys that the contract promises.
func TestExplainJSON(t *testing.T) {
	s, c := explainState(t)
	b, err := json.Marshal(Explain(s, c, mustID(t, "app/api"), mustID(t, "data/db"), mustService(t, "tcp/5432"), noon))
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"verdict", "code", "stage", "rule", "policy_revision", "from", "to", "observed", "expected", "nearest", "remedy"} {
		if _, ok := m[k]; !ok || m[k] == nil {
			t.Errorf("%s has no %s", b, k)
		}
	}
	if m["verdict"] != "allow" || m["code"] != "POLICY_ALLOW" || m["from"].(map[string]any)["id"] != "spiffe://settler.example/app/api" {
		t.Errorf("got %s", b)
	}
}

// place puts every workload on the node of its own name, with addresses by its number.
func place(s *registry.State, nodes ...string) {
	s.Overlay4, s.Overlay6 = netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd00::/48")
	for i, n := range nodes {
		s.Nodes[n] = registry.Node{Name: n, Status: registry.NodeActive, Number: identity.Number(1000 + i)}
	}
	for _, w := range s.Policy.Workloads {
		for _, n := range nodes {
			if !w.PlacedOn(n) {
				continue
			}
			k := byte(len(s.Instances) + 1)
			a6 := netip.MustParseAddr("fd00::").As16()
			a6[15] = k
			s.Instances = append(s.Instances, registry.Instance{Workload: w.ID, Number: s.Numbers[w.ID], Node: n,
				IPv4: netip.AddrFrom4([4]byte{198, 18, 0, k}), IPv6: netip.AddrFrom16(a6)})
		}
	}
}

func TestExplainPlacement(t *testing.T) {
	s := Candidate(mustDoc(t, header("app/api", "data/db")+"rules:\n- {id: db, from: [app/api], to: [data/db], allow: [tcp/5432]}\n"))
	place(s, "api")
	ask := func() Explanation {
		return Explain(s, mustCompile(t, s), mustID(t, "app/api"), mustID(t, "data/db"), mustService(t, "tcp/5432"), noon)
	}
	if x := ask(); x.Verdict != flow.Allow || x.From.Node != "api" || len(x.Warnings) != 1 || !strings.Contains(x.Warnings[0], "data/db is placed on no active node") {
		t.Errorf("got %+v", x)
	}
	s.Instances[0].Revoked = true
	if x := ask(); x.Verdict != flow.Deny || x.Code != flow.Revoked || x.Stage != "placement" {
		t.Errorf("got %+v", x)
	}
	s.Instances[0].Revoked = false
	node := s.Nodes["api"]
	node.Status = registry.NodeRevoked
	s.Nodes["api"] = node
	if x := ask(); x.Code != flow.Revoked {
		t.Errorf("got %+v", x)
	}
	node.Status = registry.NodePending
	s.Nodes["api"] = node
	if x := ask(); x.Verdict != flow.Allow || len(x.Warnings) != 2 {
		t.Errorf("got %+v", x)
	}
}

// TestExplainWide: a question wider than a port is never answered by a rule for one port.
func TestExplainWide(t *testing.T) {
	s, c := explainState(t)
	for _, svc := range []string{"tcp", "any", "tcp/5432-5433"} {
		x := Explain(s, c, mustID(t, "app/api"), mustID(t, "data/db"), mustService(t, svc), noon)
		if x.Verdict != flow.Deny || len(x.Warnings) == 0 {
			t.Errorf("%s: got %+v", svc, x)
		}
	}
}

// TestExplainWideDeny: an allow for every port does not hide a deny for one.
func TestExplainWideDeny(t *testing.T) {
	s := Candidate(mustDoc(t, header("app/a", "app/b")+"rules:\n- {id: all, from: [app/a], to: [app/b], allow: [any]}\n- {id: no-ssh, from: [app/a], to: [app/b], deny: [tcp/22]}\n"))
	c := mustCompile(t, s)
	for svc, want := range map[string]flow.Verdict{"any": flow.Deny, "tcp": flow.Deny, "tcp/20-30": flow.Deny, "tcp/23-30": flow.Allow, "udp": flow.Allow, "tcp/22": flow.Deny, "tcp/23": flow.Allow} {
		if x := Explain(s, c, mustID(t, "app/a"), mustID(t, "app/b"), mustService(t, svc), noon); x.Verdict != want || want == flow.Deny && x.Rule != "no-ssh" {
			t.Errorf("%s: got %+v", svc, x)
		}
	}
}

func TestRunTests(t *testing.T) {
	doc := mustDoc(t, header("app/api", "app/hook", "data/db", "data/redis")+rulesForExplain+`tests:
- {from: app/api, to: data/db, port: tcp/5432, expect: allow}
- {from: app/hook, to: data/redis, port: tcp/6379, expect: deny}
- {from: app/hook, to: data/redis, port: tcp/6379, expect: allow}
- {from: app/api, to: data/db, port: icmp, expect: allow}
`)
	results, err := RunTests(doc, noon)
	if err != nil || len(results) != 4 {
		t.Fatalf("%v, %v", results, err)
	}
	for i, want := range []string{
		"p.yaml:16:4: app/api to data/db on tcp/5432: ok",
		"p.yaml:17:4: app/hook to data/redis on tcp/6379: ok",
		"p.yaml:18:4: app/hook to data/redis on tcp/6379: expected allow, got deny (POLICY_DENY by rule no-cache)",
		"p.yaml:19:4: app/api to data/db on icmp: expected allow, got deny (NO_RULE)",
	} {
		if got := results[i].String(); got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
		if results[i].Pass == (results[i].Explanation != nil) {
			t.Errorf("test %d: pass %v, explanation %v", i, results[i].Pass, results[i].Explanation)
		}
	}
	doc.Rules[0].Services[0] = policy.Service{Proto: flow.TCP, First: 80, Last: 79}
	if _, err := RunTests(doc, noon); err == nil {
		t.Error("a document that does not compile has passed")
	}
}

// TestNodeView: a node learns what its workloads' rules name, and nothing else.
func TestNodeView(t *testing.T) {
	s := Candidate(mustDoc(t, `zones: [{name: app}, {name: data}]
workloads:
- {id: app/api, selectors: ["unit:api.service"], nodes: ["api-*"]}
- {id: app/other, selectors: ["unit:other.service"], nodes: [other]}
- {id: data/db, selectors: ["unit:db.service"], nodes: [db, pending, dead, "api-2"]}
rules:
- {id: db, from: [app/api], to: [data/db], allow: [tcp/5432]}
- {id: alone, from: [app/other], to: [app/other], allow: [any]}
`))
	place(s, "api-1", "api-2", "other", "db", "pending", "dead")
	for n, status := range map[string]registry.NodeStatus{"pending": registry.NodePending, "dead": registry.NodeRevoked} {
		node := s.Nodes[n]
		node.Status = status
		s.Nodes[n] = node
	}
	c := mustCompile(t, s)
	v := c.For("api-1")
	var peers, nodes []string
	for _, p := range v.Peers {
		peers = append(peers, p.Workload.Short()+"@"+p.Node)
	}
	for _, n := range v.PeerNodes {
		nodes = append(nodes, n.Name)
	}
	if len(v.Workloads) != 1 || len(v.Workloads[0].Addresses) != 2 || len(v.Workloads[0].Selectors) != 1 || len(v.Rulesets) != 1 {
		t.Errorf("got %+v", v.Workloads)
	}
	if !slices.Equal(peers, []string{"data/db@api-2", "data/db@db"}) || !slices.Equal(nodes, []string{"api-2", "db"}) {
		t.Errorf("peers %v on %v", peers, nodes)
	}
	if len(v.Rules) != 1 || v.Rules[1] != "db" || len(v.Names) != 2 || len(v.Revoked) != 2 {
		t.Errorf("rules %v, names %v, tombstones %v", v.Rules, v.Names, v.Revoked)
	}
	view := c.View("api-1")
	if err := view.Validate(); err != nil {
		t.Error(err)
	}
	if len(view.Addresses) != 2+4+2 {
		t.Errorf("addresses %v", view.Addresses)
	}
	for _, n := range []string{"pending", "dead", "nowhere"} {
		if v := c.For(n); len(v.Workloads)+len(v.Peers)+len(v.Rulesets)+len(v.Names) != 0 {
			t.Errorf("%s: got %+v", n, v)
		}
	}
	if v := c.For("other"); len(v.Peers) != 0 || len(v.Rulesets) != 1 {
		t.Errorf("got %+v", v)
	}
}

// TestNodeViewRevoked: a revoked instance is no workload and no peer, and leaves a tombstone on both sides.
func TestNodeViewRevoked(t *testing.T) {
	s := Candidate(mustDoc(t, header("app/api", "data/db")+"rules:\n- {id: db, from: [app/api], to: [data/db], allow: [tcp/5432]}\n"))
	place(s, "api", "db")
	s.Instances[0].Revoked = true
	c := mustCompile(t, s)
	if v := c.For("api"); len(v.Workloads) != 0 || len(v.Rulesets) != 0 || len(v.Revoked) != 2 {
		t.Errorf("own: %+v", v)
	}
	v := c.For("db")
	if len(v.Peers) != 0 || v.Revoked[s.Instances[0].IPv4] != s.Instances[0].Number {
		t.Errorf("peer: %+v", v)
	}
	if got := fmt.Sprint(len(c.For("db").Workloads)); got != "1" {
		t.Error(got)
	}
}
