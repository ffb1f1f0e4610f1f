package compile

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// noon is when every test asks.
var noon = time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)

func mustDoc(t testing.TB, text string) *policydoc.Document {
	t.Helper()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	doc, _, err := policydoc.Parse(td, []policydoc.File{{Name: "p.yaml", Data: []byte(text)}})
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func mustCompile(t testing.TB, s *registry.State) *Compiled {
	t.Helper()
	c, err := Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustID(t testing.TB, short string) identity.ID {
	t.Helper()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	id, err := td.ParseShort(short)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func mustService(t testing.TB, s string) policy.Service {
	t.Helper()
	svc, err := policy.ParseService(s)
	if err != nil {
		t.Fatal(err)
	}
	return svc
}

// header declares every workload that it is given, on a node of its own name.
func header(ids ...string) string {
	var zones, workloads strings.Builder
	seen := map[string]bool{}
	for _, id := range ids {
		zone, name, _ := strings.Cut(id, "/")
		if !seen[zone] {
			seen[zone] = true
			fmt.Fprintf(&zones, "- {name: %s}\n", zone)
		}
		fmt.Fprintf(&workloads, "- {id: %s, selectors: [\"unit:%s.service\"], nodes: [%s]}\n", id, name, name)
	}
	return "zones:\n" + zones.String() + "workloads:\n" + workloads.String()
}

// question is what the reference evaluator is asked.
type question struct {
	from, to policydoc.Workload
	proto    flow.Proto
	port     uint16
}

// reference is policy as the contract says it, over rules: deny wins; what no rule allows is denied. It shares no code
// with the compiler. The rule is the most specific one; among those the one that stands longest, then the first.
func reference(doc *policydoc.Document, q question, now time.Time) (flow.Verdict, flow.Reason, string) {
	type found struct {
		rule     string
		specific int
		expires  time.Time
	}
	better := func(a, b found) bool {
		if a.specific != b.specific {
			return a.specific > b.specific
		}
		if a.expires.IsZero() || b.expires.IsZero() {
			return a.expires.IsZero() && !b.expires.IsZero()
		}
		return a.expires.After(b.expires)
	}
	var deny, allow, stale found
	for _, r := range doc.Rules {
		if !referenceSide(r.From, q.from) || !referenceSide(r.To, q.to) {
			continue
		}
		for _, s := range r.Services {
			specific := 0
			switch {
			case s.Proto == 0:
				specific = 1
			case s.Proto != q.proto:
			case s.First == 0:
				specific = 2
			case s.First <= q.port && q.port <= s.Last:
				specific = 3
			}
			if specific == 0 {
				continue
			}
			this := found{r.ID, specific, r.Expires}
			slot := &allow
			active := r.Expires.IsZero() || now.Before(r.Expires)
			switch {
			case r.Action == policy.ActionDeny && !active:
				continue
			case r.Action == policy.ActionDeny:
				slot = &deny
			case !active:
				slot = &stale
			}
			if slot.rule == "" || better(this, *slot) {
				*slot = this
			}
		}
	}
	switch {
	case deny.rule != "":
		return flow.Deny, flow.PolicyDeny, deny.rule
	case allow.rule != "":
		return flow.Allow, flow.PolicyAllow, allow.rule
	case stale.rule != "":
		return flow.Deny, flow.Expired, stale.rule
	}
	return flow.Deny, flow.NoRule, ""
}

func referenceSide(patterns []policydoc.Pattern, w policydoc.Workload) bool {
	for _, p := range patterns {
		short := w.ID.Short()
		switch {
		case !p.ID.IsZero():
			if short == p.ID.Short() {
				return true
			}
		case !p.Zone.IsZero():
			if strings.HasPrefix(short, p.Zone.String()+"/") {
				return true
			}
		case len(p.Labels) > 0:
			held := 0
			for k, v := range p.Labels {
				if have, ok := w.Labels[k]; ok && have == v {
					held++
				}
			}
			if held == len(p.Labels) {
				return true
			}
		}
	}
	return false
}

// genDoc draws documents in which rules meet: few workloads, few ports, overlapping ranges.
func genDoc(t *rapid.T) *policydoc.Document {
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	doc := &policydoc.Document{}
	zoneNames := []string{"app", "data", "ap", "void"}
	zones := make([]identity.Zone, len(zoneNames))
	for i, z := range zoneNames {
		if zones[i], err = identity.ParseZone(z); err != nil {
			t.Fatal(err)
		}
	}
	names := []string{"a.b", "aXb", "A.B", "a", "a-b"}
	for i := range rapid.IntRange(1, 8).Draw(t, "workloads") {
		id, err := td.Workload(zones[i%3], names[i/3])
		if err != nil {
			t.Fatal(err)
		}
		labels := map[string]string{}
		for _, k := range []string{"team", "tier"} {
			if v := rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, k); v != "" {
				labels[k] = v
			}
		}
		doc.Workloads = append(doc.Workloads, policydoc.Workload{ID: id, Labels: labels})
	}
	pattern := rapid.Custom(func(t *rapid.T) policydoc.Pattern {
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 0:
			return policydoc.Pattern{Zone: rapid.SampledFrom(zones).Draw(t, "zone")}
		case 1:
			l := map[string]string{"team": rapid.SampledFrom([]string{"x", "y", "none"}).Draw(t, "team")}
			if rapid.Bool().Draw(t, "two") {
				l["tier"] = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "tier")
			}
			return policydoc.Pattern{Labels: l}
		}
		return policydoc.Pattern{ID: rapid.SampledFrom(doc.Workloads).Draw(t, "workload").ID}
	})
	service := rapid.Custom(func(t *rapid.T) policy.Service {
		proto := rapid.SampledFrom([]flow.Proto{flow.AnyProto, flow.TCP, flow.UDP, flow.ICMP}).Draw(t, "proto")
		s := policy.Service{Proto: proto}
		if proto != flow.AnyProto && proto != flow.ICMP && rapid.IntRange(0, 3).Draw(t, "ports") > 0 {
			s.First = rapid.SampledFrom([]uint16{1, 79, 80, 81, 65534, 65535}).Draw(t, "first")
			s.Last = s.First + uint16(rapid.IntRange(0, min(3, 65535-int(s.First))).Draw(t, "more"))
		}
		return s
	})
	for i := range rapid.IntRange(0, 8).Draw(t, "rules") {
		r := policydoc.Rule{
			ID:       fmt.Sprintf("r%d", i),
			From:     rapid.SliceOfN(pattern, 1, 3).Draw(t, "from"),
			To:       rapid.SliceOfN(pattern, 1, 3).Draw(t, "to"),
			Services: rapid.SliceOfN(service, 1, 3).Draw(t, "services"),
			Action:   policy.Action(rapid.SampledFrom([]uint8{1, 1, 1, 0}).Draw(t, "action")),
		}
		if h := rapid.IntRange(-3, 3).Draw(t, "expires"); h < 3 {
			r.Expires = noon.Add(time.Duration(h) * time.Hour) // 0: at the very instant, which is too late
		}
		doc.Rules = append(doc.Rules, r)
	}
	return doc
}

// TestCompiledMatchesReference is P-1, in both rulesets: the sender's and the receiver's host must say the same.
func TestCompiledMatchesReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		doc := genDoc(t)
		s := Candidate(doc)
		c, err := Compile(s)
		if err != nil {
			t.Fatal(err)
		}
		v := policy.View{Rulesets: c.Rulesets}
		for _, from := range doc.Workloads {
			for _, to := range doc.Workloads {
				for _, proto := range []flow.Proto{flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6} {
					for _, port := range []uint16{0, 1, 80, 82, 65535} {
						q := question{from, to, proto, port}
						if proto == flow.ICMPv6 {
							q.proto = flow.ICMP
						}
						wv, wr, wrule := reference(doc, q, noon)
						tuple := flow.Tuple{Proto: proto, Dst: netip.AddrPortFrom(netip.Addr{}, port)}
						f, t2 := s.Numbers[from.ID], s.Numbers[to.ID]
						for dir, ends := range [2][2]identity.Number{{f, t2}, {t2, f}} {
							gv, gr, grule := v.Lookup(ends[0], ends[1], policy.Direction(dir), tuple, noon)
							if gv != wv || gr != wr || c.Rules[grule] != wrule {
								t.Fatalf("%s to %s %v/%d %v: got %v %v %q, want %v %v %q", from.ID.Short(), to.ID.Short(), proto, port,
									policy.Direction(dir), gv, gr, c.Rules[grule], wv, wr, wrule)
							}
						}
					}
				}
			}
		}
	})
}

// TestExplainMatchesReference: the answer to a person is that of the judge.
func TestExplainMatchesReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		doc := genDoc(t)
		s := Candidate(doc)
		c, err := Compile(s)
		if err != nil {
			t.Fatal(err)
		}
		from, to := rapid.SampledFrom(doc.Workloads).Draw(t, "f"), rapid.SampledFrom(doc.Workloads).Draw(t, "t")
		svc := policy.Service{Proto: flow.TCP, First: 80, Last: 80}
		v, r, rule := reference(doc, question{from, to, flow.TCP, 80}, noon)
		x := Explain(s, c, from.ID, to.ID, svc, noon)
		if x.Verdict != v || x.Code != r || x.Rule != rule || len(x.Nearest) > maxNearest || v == flow.Deny && x.Remedy == "" {
			t.Fatalf("got %+v, want %v %v %q", x, v, r, rule)
		}
		for _, n := range x.Nearest {
			if n.Fails == "" {
				t.Fatalf("rule %s is near and nothing fails: %+v", n.Rule, x)
			}
		}
	})
}

// TestEmptySelection is P-2: patterns that select nothing match nothing, the zero Pattern included.
func TestEmptySelection(t *testing.T) {
	doc := mustDoc(t, header("app/a", "app/b")+"- {id: app/c, selectors: [\"uid:1\"], nodes: [n], labels: {team: x}}\nrules:\n"+
		"- {id: r1, from: [labels: {team: none}], to: [app/*], allow: [any]}\n"+
		"- {id: r2, from: [app/*], to: [labels: {team: x, tier: y}], allow: [any]}\n")
	doc.Rules = append(doc.Rules,
		policydoc.Rule{ID: "zero", From: []policydoc.Pattern{{}}, To: []policydoc.Pattern{{}}, Action: policy.ActionAllow, Services: []policy.Service{{}}},
		policydoc.Rule{ID: "none", Action: policy.ActionAllow, Services: []policy.Service{{}}},
		policydoc.Rule{ID: "deleted", From: []policydoc.Pattern{{ID: mustID(t, "app/gone")}}, To: []policydoc.Pattern{{Zone: doc.Zones[0]}},
			Action: policy.ActionAllow, Services: []policy.Service{{}}})
	c := mustCompile(t, Candidate(doc))
	if len(c.Rulesets) != 0 {
		t.Errorf("got %v", c.Rulesets)
	}
}

// TestNeverMatchOneAnother is P-3.
func TestNeverMatchOneAnother(t *testing.T) {
	ids := []string{"app/a.b", "app/aXb", "app/A.B", "app/a", "app/a.b.c", "ap/pa.b", "app/b", "apps/a.b"}
	doc := mustDoc(t, header(append(ids, "data/db")...)+"rules:\n- {id: r, from: [app/a.b], to: [data/db], allow: [any]}\n")
	s := Candidate(doc)
	c := mustCompile(t, s)
	for _, id := range ids {
		x := Explain(s, c, mustID(t, id), mustID(t, "data/db"), mustService(t, "tcp/5432"), noon)
		if (x.Verdict == flow.Allow) != (id == "app/a.b") {
			t.Errorf("%s: %v", id, x.Verdict)
		}
	}
}

// TestDirections is P-5: a rule opens one direction, judged on both hosts, and nothing else.
func TestDirections(t *testing.T) {
	doc := mustDoc(t, header("app/a", "app/b", "app/c")+"rules:\n- {id: r, from: [app/a], to: [app/b], allow: [tcp/80]}\n- {id: self, from: [app/c], to: [app/c], allow: [tcp/80]}\n")
	s := Candidate(doc)
	c := mustCompile(t, s)
	v := policy.View{Rulesets: c.Rulesets}
	a, b, self := s.Numbers[mustID(t, "app/a")], s.Numbers[mustID(t, "app/b")], s.Numbers[mustID(t, "app/c")]
	for _, row := range []struct {
		own, peer identity.Number
		dir       policy.Direction
		port      uint16
		want      flow.Verdict
	}{
		{a, b, policy.Egress, 80, flow.Allow}, {b, a, policy.Ingress, 80, flow.Allow},
		{a, b, policy.Ingress, 80, flow.Deny}, {b, a, policy.Egress, 80, flow.Deny},
		{a, b, policy.Egress, 81, flow.Deny}, {a, b, policy.Egress, 0, flow.Deny}, {a, self, policy.Egress, 80, flow.Deny},
		{a, a, policy.Egress, 80, flow.Deny}, {b, b, policy.Ingress, 80, flow.Deny},
		{self, self, policy.Egress, 80, flow.Allow}, {self, self, policy.Ingress, 80, flow.Allow},
		{identity.NumberUnknown, b, policy.Egress, 80, flow.Deny}, {b, identity.NumberUnknown, policy.Ingress, 80, flow.Deny},
	} {
		got, _, _ := v.Lookup(row.own, row.peer, row.dir, flow.Tuple{Proto: flow.TCP, Dst: netip.AddrPortFrom(netip.Addr{}, row.port)}, noon)
		if got != row.want {
			t.Errorf("%v to %v %v port %d: %v", row.own, row.peer, row.dir, row.port, got)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	text := header("app/a", "app/b") + "rules:\n- {id: r, from: [app/a], to: [app/b], allow: [tcp/80]}\n- {id: q, from: [app/a], to: [app/b], allow: [tcp/80]}\n"
	for name, change := range map[string]func(s *registry.State){
		"rule without number":       func(s *registry.State) { delete(s.RuleNumbers, "r") },
		"two rules with one number": func(s *registry.State) { s.RuleNumbers["q"] = 1 },
		"workload without number":   func(s *registry.State) { delete(s.Numbers, s.Policy.Workloads[0].ID) },
		"reserved number":           func(s *registry.State) { s.Numbers[s.Policy.Workloads[0].ID] = identity.NumberHost },
		"two workloads, one number": func(s *registry.State) { s.Numbers[s.Policy.Workloads[0].ID] = identity.FirstNumber + 1 },
		"wide range":                func(s *registry.State) { s.Policy.Rules[0].Services[0].Last = 80 + 1024 },
		"range that ends before":    func(s *registry.State) { s.Policy.Rules[0].Services[0].Last = 79 },
		"port of every protocol":    func(s *registry.State) { s.Policy.Rules[0].Services[0].Proto = flow.AnyProto },
	} {
		s := Candidate(mustDoc(t, text))
		change(s)
		if c, err := Compile(s); !errors.Is(err, ErrCompile) || c != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := Candidate(mustDoc(t, text))
	s.Policy.Rules[0].Services[0].Last = 80 + 1023
	if _, err := Compile(s); err != nil {
		t.Errorf("1024 ports: %v", err)
	}
	s.Policy.Rules[0].Services[0].Last = 80 + 1024
	if _, err := Compile(s); !errors.Is(err, policy.ErrNotBuilt) || !strings.Contains(err.Error(), "rule r: ") {
		t.Errorf("got %v", err)
	}
}

// TestTooLarge: both limits name the rule, soon.
func TestTooLarge(t *testing.T) {
	var ids []string
	for i := range 1500 {
		ids = append(ids, fmt.Sprintf("app/w%d", i))
	}
	head := header(ids...)
	for want, rules := range map[string]string{
		"entries": "- {id: mesh, from: [app/*], to: [app/*], allow: [any]}\n",
		"steps":   "- {id: one, from: [app/w1], to: [app/*], allow: [tcp/1-1024]}\n",
	} {
		if want == "steps" {
			var b strings.Builder
			for i := range 7 {
				fmt.Fprintf(&b, "- {id: r%d, from: [app/w1], to: [app/*], allow: [tcp/1-300]}\n", i)
			}
			rules = b.String()
		}
		start := time.Now()
		_, err := Compile(Candidate(mustDoc(t, head+"rules:\n"+rules)))
		if !errors.Is(err, errTooLarge) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "p.yaml:") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("took %v", took)
		}
	}
}

func benchState(b *testing.B) *registry.State {
	var doc strings.Builder
	doc.WriteString("zones: [{name: app}, {name: data}]\nworkloads:\n")
	for i := range 1000 {
		fmt.Fprintf(&doc, "- {id: app/w%d, selectors: [\"unit:w%d.service\"], nodes: [n%d], labels: {team: t%d}}\n", i, i, i%100, i%50)
	}
	doc.WriteString("rules:\n")
	for i := range 5000 {
		fmt.Fprintf(&doc, "- {id: r%d, from: [app/w%d, labels: {team: t%d}], to: [app/w%d], allow: [tcp/%d, udp/53]}\n", i, i%1000, i%50, i*7%1000, 1+i%60000)
	}
	return Candidate(mustDoc(b, doc.String()))
}

func BenchmarkCompile1000x5000(b *testing.B) {
	s := benchState(b)
	b.ReportAllocs()
	entries := 0
	for b.Loop() {
		c, err := Compile(s)
		if err != nil {
			b.Fatal(err)
		}
		entries = 0
		for _, rs := range c.Rulesets {
			entries += len(rs)
		}
	}
	b.ReportMetric(float64(entries), "entries")
}

func BenchmarkExplain1000x5000(b *testing.B) {
	s := benchState(b)
	c := mustCompile(b, s)
	from, to := s.Policy.Workloads[3].ID, s.Policy.Workloads[999].ID
	for b.Loop() {
		Explain(s, c, from, to, policy.Service{Proto: flow.TCP, First: 9, Last: 9}, noon)
	}
}
