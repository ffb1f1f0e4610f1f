package compile

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
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

// reference is policy as the contract says it, over rules: deny wins; what no rule allows is denied; what only a rule in
// mode audit would deny or withhold passes as audit. It shares no code with the compiler, and asks every rule about one
// port. The rule that it names is the most specific one: the port alone or in a range, the protocol, any.
func reference(doc *policydoc.Document, q question, now time.Time) (flow.Verdict, flow.Reason, string) {
	var levels [4][]policydoc.Rule
	for _, r := range doc.Rules {
		if !referenceSide(r.From, q.from) || !referenceSide(r.To, q.to) {
			continue
		}
		var at [4]bool
		for _, s := range r.Services {
			switch {
			case s.Proto == 0:
				at[0] = true
			case s.Proto != q.proto:
			case s.First == 0:
				at[1] = true
			case s.First <= q.port && q.port <= s.Last:
				at[2] = true
			}
		}
		for l, is := range at {
			if is {
				levels[l] = append(levels[l], r)
			}
		}
	}
	var deny, audit, allow, lenient, stale string
	set := func(s *string, rule string) {
		if *s == "" {
			*s = rule
		}
	}
	for l := len(levels) - 1; l >= 0; l-- {
		set(&deny, longest(levels[l], now, policy.ActionDeny, false))
		set(&audit, longest(levels[l], now, policy.ActionDeny, true))
		rule, stands, soft := referenceAllow(levels[l], now)
		switch {
		case rule == "":
		case stands:
			set(&allow, rule)
		case soft:
			set(&lenient, rule)
		default:
			set(&stale, rule)
		}
	}
	switch {
	case deny != "":
		return flow.Deny, flow.PolicyDeny, deny
	case allow == "" && lenient == "" && stale != "":
		return flow.Deny, flow.Expired, stale
	case allow == "" && lenient == "":
		return flow.Deny, flow.NoRule, ""
	case audit != "":
		return flow.Audit, flow.PolicyDeny, audit
	case allow != "":
		return flow.Allow, flow.PolicyAllow, allow
	}
	return flow.Audit, flow.Expired, lenient
}

// longest names the rule of an action and a mode that stands longest of those that stand, the first among equals.
func longest(rules []policydoc.Rule, now time.Time, action policy.Action, audit bool) string {
	best := policydoc.Rule{}
	for _, r := range rules {
		if r.Action != action || r.Audit != audit || !r.Expires.IsZero() && !now.Before(r.Expires) {
			continue
		}
		if best.ID == "" || !best.Expires.IsZero() && (r.Expires.IsZero() || r.Expires.After(best.Expires)) {
			best = r
		}
	}
	return best.ID
}

// referenceAllow is what the allow rules of one level come to: the rule to name, whether any of them stands, and whether
// any is in mode audit. An endless one is named first; then one in mode audit; then the one that stands longest, which
// may be over.
func referenceAllow(rules []policydoc.Rule, now time.Time) (named string, stands, soft bool) {
	var endless, audits, enforced []policydoc.Rule
	for _, r := range rules {
		if r.Action != policy.ActionAllow {
			continue
		}
		stands = stands || r.Expires.IsZero() || now.Before(r.Expires)
		soft = soft || r.Audit
		switch {
		case r.Expires.IsZero():
			endless = append(endless, r)
		case r.Audit:
			audits = append(audits, r)
		default:
			enforced = append(enforced, r)
		}
	}
	for _, list := range [][]policydoc.Rule{endless, audits, enforced} {
		if len(list) > 0 {
			first := slices.MaxFunc(list, func(a, b policydoc.Rule) int { return a.Expires.Compare(b.Expires) })
			return first.ID, stands, soft
		}
	}
	return "", false, false
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
		proto := rapid.SampledFrom([]flow.Proto{flow.AnyProto, flow.TCP, flow.TCP, flow.TCP, flow.UDP, flow.SCTP, flow.ICMP}).Draw(t, "proto")
		s := policy.Service{Proto: proto}
		if proto != flow.AnyProto && proto != flow.ICMP && rapid.IntRange(0, 5).Draw(t, "ports") > 0 {
			s.First = rapid.SampledFrom([]uint16{1, 2, 79, 80, 81, 96, 1024, 65534, 65535}).Draw(t, "first")
			width := rapid.SampledFrom([]int{0, 0, 1, 2, 15, 16, 1000, 32768, 65535}).Draw(t, "more")
			s.Last = s.First + uint16(min(width, 65535-int(s.First)))
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
			Audit:    rapid.IntRange(0, 2).Draw(t, "audit") == 0,
		}
		if h := rapid.IntRange(-3, 3).Draw(t, "expires"); h < 3 {
			r.Expires = noon.Add(time.Duration(h) * time.Hour) // 0: at the very instant, which is too late
		}
		doc.Rules = append(doc.Rules, r)
	}
	return doc
}

// edges are the ports at which an answer may change, with their neighbours, and some others.
func edges(doc *policydoc.Document) []uint16 {
	ports := map[uint16]bool{0: true, 1: true, 80: true, 82: true, 32767: true, 32768: true, 65535: true}
	for _, r := range doc.Rules {
		for _, s := range r.Services {
			for d := -1; d <= 1; d++ {
				for _, p := range [...]uint16{s.First, s.Last} {
					if at := int(p) + d; at >= 0 && at <= 65535 {
						ports[uint16(at)] = true
					}
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(ports))
}

// TestCompiledMatchesReference is P-1, in both rulesets: the sender's and the receiver's host must say the same, now and
// at every other time.
func TestCompiledMatchesReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		doc := genDoc(t)
		s := Candidate(doc)
		c, err := Compile(s)
		if err != nil {
			t.Fatal(err)
		}
		for n, rs := range c.Rulesets {
			if err := rs.Validate(); err != nil || len(rs) == 0 {
				t.Fatalf("ruleset of %v with %d entries: %v", n, len(rs), err)
			}
		}
		v := policy.View{Rulesets: c.Rulesets}
		now := noon.Add(time.Duration(rapid.IntRange(-4, 4).Draw(t, "now")) * time.Hour)
		ports := edges(doc)
		from, to := rapid.SampledFrom(doc.Workloads).Draw(t, "f"), rapid.SampledFrom(doc.Workloads).Draw(t, "t")
		for _, proto := range []flow.Proto{flow.TCP, flow.UDP, flow.SCTP, flow.ICMP, flow.ICMPv6} {
			for _, port := range ports {
				q := question{from, to, proto, port}
				if proto == flow.ICMPv6 {
					q.proto = flow.ICMP
				}
				wv, wr, wrule := reference(doc, q, now)
				tuple := flow.Tuple{Proto: proto, Dst: netip.AddrPortFrom(netip.Addr{}, port)}
				f, t2 := s.Numbers[from.ID], s.Numbers[to.ID]
				for dir, ends := range [2][2]identity.Number{{f, t2}, {t2, f}} {
					got := v.Lookup(ends[0], ends[1], policy.Direction(dir), tuple, now)
					if got.Verdict != wv || got.Reason != wr || c.Rules[got.Rule] != wrule || (got.Under == 0) != (wv == flow.Deny) {
						t.Fatalf("%s to %s %v/%d %v: got %v %v %q, want %v %v %q", from.ID.Short(), to.ID.Short(), proto, port,
							policy.Direction(dir), got.Verdict, got.Reason, c.Rules[got.Rule], wv, wr, wrule)
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
		if x.Verdict != v || x.Code != r || x.Rule != rule || len(x.Nearest) > maxNearest || v != flow.Allow && x.Remedy == "" {
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
		policydoc.Rule{ID: "deleted", From: []policydoc.Pattern{{ID: mustID(t, "app/gone")}}, To: []policydoc.Pattern{{Zone: doc.Zones[0].Name}},
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
		got := v.Lookup(row.own, row.peer, row.dir, flow.Tuple{Proto: flow.TCP, Dst: netip.AddrPortFrom(netip.Addr{}, row.port)}, noon)
		if got.Verdict != row.want {
			t.Errorf("%v to %v %v port %d: %+v", row.own, row.peer, row.dir, row.port, got)
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
		"range from port 0": func(s *registry.State) {
			s.Policy.Rules[0].Services[0] = policy.Service{Proto: flow.TCP, Last: 80}
		},
		"port of icmp":           func(s *registry.State) { s.Policy.Rules[0].Services[0].Proto = flow.ICMP },
		"range that ends before": func(s *registry.State) { s.Policy.Rules[0].Services[0].Last = 79 },
		"port of every protocol": func(s *registry.State) { s.Policy.Rules[0].Services[0].Proto = flow.AnyProto },
	} {
		s := Candidate(mustDoc(t, text))
		change(s)
		if c, err := Compile(s); !errors.Is(err, ErrCompile) || c != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// odd lists ranges of three ports that do not touch: each is two entries.
func odd(n int) string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("tcp/%d-%d", 10*i+8, 10*i+10)
	}
	return strings.Join(list, ", ")
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
		"steps":   "",
		// Ranges are counted before they are written, too.
		"mesh: the policy is too large: with this rule it has more than": "- {id: mesh, from: [app/*], to: [app/*], allow: [tcp/1-2]}\n",
		"many: the policy is too large: with this rule it has":           "- {id: many, from: [app/*], to: [app/w0, app/w1, app/w2, app/w3, app/w4, app/w5, app/w6, app/w7], allow: [" + odd(100) + "]}\n",
	} {
		if want == "steps" {
			var b strings.Builder
			ports := make([]string, 300)
			for i := range ports {
				ports[i] = fmt.Sprintf("tcp/%d", i+1)
			}
			for i := range 7 {
				fmt.Fprintf(&b, "- {id: r%d, from: [app/w1], to: [app/*], allow: [%s]}\n", i, strings.Join(ports, ", "))
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
