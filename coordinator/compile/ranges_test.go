package compile

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// TestPrefixes: a range is written as Keys that hold its ports and no other, each once.
func TestPrefixes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := rapid.IntRange(0, 65534).Draw(t, "first")
		if first == 1 {
			first = 0 // ranges from port 1 are kept as ones from port 0
		}
		last := rapid.IntRange(first+1, 65535).Draw(t, "last")
		rs := policy.Ruleset{}
		next := first
		for _, k := range prefixes(uint16(first), uint16(last)) {
			size := 1
			if k.Bits > 0 {
				size = 1 << (16 - k.Bits)
			}
			if int(k.Port) != next {
				t.Fatalf("%d-%d: %+v after port %d", first, last, k, next-1)
			}
			next += size
			k.Proto = flow.TCP
			rs[k] = policy.Value{Deny: policy.Slot{Rule: 1}}
		}
		if err := rs.Validate(); err != nil || next != last+1 || len(rs) > 30 {
			t.Fatalf("%d-%d: %d entries up to port %d: %v", first, last, len(rs), next-1, err)
		}
	})
}

// TestRangesAreFewEntries: at both ends, with neighbours of one value joined, and a port inside kept beside the range.
func TestRangesAreFewEntries(t *testing.T) {
	for services, want := range map[string]int{
		"tcp/1-65535": 2, "tcp/1-65535, udp/1-65535, sctp/1-65535": 6, "tcp/1024-2047": 1, "tcp/1-1024": 2, "tcp/80-81": 1, "tcp/81-82": 2,
		"tcp/2-65534": 29, "tcp/1024-1535, tcp/1536-2047": 1, "tcp/1024-1600, tcp/1100-2047": 1, "tcp/1024-2047, tcp/1024": 2,
		"tcp/1024-2047, tcp": 2, "tcp/1024-2047, any, icmp": 3,
	} {
		c := mustCompile(t, Candidate(mustDoc(t, header("app/a", "app/b")+"rules:\n- {id: r, from: [app/a], to: [app/b], allow: ["+services+"]}\n")))
		for n, rs := range c.Rulesets {
			if len(rs) != want {
				t.Errorf("%s: ruleset of %v has %d entries, expected %d: %v", services, n, len(rs), want, rs)
			}
		}
	}
}

// TestPairsShareACut: the rules of a thousand pairs are cut once.
func TestPairsShareACut(t *testing.T) {
	var ids []string
	for i := range 30 {
		ids = append(ids, fmt.Sprintf("app/w%d", i))
	}
	s := Candidate(mustDoc(t, header(ids...)+"rules:\n- {id: a, from: [app/*], to: [app/*], allow: [tcp/8-80]}\n- {id: b, from: [app/w1], to: [app/w2], deny: [tcp/10-11]}\n"))
	c := mustCompile(t, s)
	e := &expander{c: c, order: map[uint32]int{1: 0, 2: 1}, known: map[string]*cut{}}
	one, _, err := e.cut([]int{0})
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := e.cut([]int{0})
	if err != nil || again != one {
		t.Errorf("cut twice: %v", err)
	}
	both, _, err := e.cut([]int{0, 1})
	if err != nil || len(both.intervals) != 3 || len(e.known) != 2 {
		t.Errorf("got %+v, %v", both, err)
	}
}

// TestOverlapsAreBounded: ranges of one pair that all overlap are refused by name, soon.
func TestOverlapsAreBounded(t *testing.T) {
	var b strings.Builder
	for i := range 4000 {
		fmt.Fprintf(&b, "- {id: r%d, from: [app/a], to: [app/b], allow: [tcp/%d-%d]}\n", i, 2+i, 65535-i)
	}
	start := time.Now()
	_, err := Compile(Candidate(mustDoc(t, header("app/a", "app/b")+"rules:\n"+b.String())))
	if err == nil || !strings.Contains(err.Error(), "rule r") || !strings.Contains(err.Error(), "overlap less") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestJoin is the table of join: what rules that meet at one port let pass, when, and under which name.
func TestJoin(t *testing.T) {
	const early, late = "2027-01-31T11:00:00Z", "2027-01-31T13:00:00Z"
	rule := func(id, more string) string {
		return "- {id: " + id + ", from: [app/a], to: [app/b], " + more + "}\n"
	}
	for _, row := range []struct {
		rules string
		want  string // at 10:00, 12:00 and 14:00
	}{
		{rule("a", "allow: [tcp/80], expires: "+early) + rule("b", "allow: [tcp/80], expires: "+late),
			"allow POLICY_ALLOW b, allow POLICY_ALLOW b, deny EXPIRED b"},
		{rule("a", "allow: [tcp/80], mode: audit, expires: "+early), "allow POLICY_ALLOW a, audit EXPIRED a, audit EXPIRED a"},
		// What the enforced rule allows in its time is not recorded as withheld; after it, the one in mode audit lets pass.
		{rule("a", "allow: [tcp/80], expires: "+late) + rule("b", "allow: [tcp/80], mode: audit, expires: "+early),
			"allow POLICY_ALLOW b, allow POLICY_ALLOW b, audit EXPIRED b"},
		{rule("a", "allow: [tcp/80], expires: "+early) + rule("b", "allow: [tcp/80], mode: audit, expires: "+late),
			"allow POLICY_ALLOW b, allow POLICY_ALLOW b, audit EXPIRED b"},
		{rule("a", "allow: [tcp/80]") + rule("b", "allow: [tcp/80], mode: audit, expires: "+early),
			"allow POLICY_ALLOW a, allow POLICY_ALLOW a, allow POLICY_ALLOW a"},
		// Which of two in mode audit is named is decided by their own expiries.
		{rule("a", "allow: [tcp/80], mode: audit, expires: "+early) + rule("b", "allow: [tcp/80], expires: 2027-01-31T16:00:00Z") +
			rule("c", "allow: [tcp/80], mode: audit, expires: "+late), "allow POLICY_ALLOW c, allow POLICY_ALLOW c, allow POLICY_ALLOW c"},
		// An enforced rule for a wider service, outside its time, neither adds nor takes.
		{rule("a", "allow: [tcp], expires: "+late) + rule("b", "allow: [tcp/79-81], mode: audit, expires: "+early),
			"allow POLICY_ALLOW b, allow POLICY_ALLOW a, audit EXPIRED b"},
		{rule("a", "allow: [any]") + rule("b", "deny: [tcp/80], mode: audit, expires: "+late),
			"audit POLICY_DENY b, audit POLICY_DENY b, allow POLICY_ALLOW a"},
		{rule("b", "deny: [tcp/80], mode: audit"), "deny NO_RULE , deny NO_RULE , deny NO_RULE "},
		{rule("a", "allow: [any]") + rule("b", "deny: [tcp/1-100], mode: audit") + rule("c", "deny: [tcp/80], expires: "+early),
			"deny POLICY_DENY c, audit POLICY_DENY b, audit POLICY_DENY b"},
		{rule("a", "allow: [tcp/80]") + rule("c", "deny: [tcp/50-90], expires: "+late), "deny POLICY_DENY c, deny POLICY_DENY c, allow POLICY_ALLOW a"},
		{rule("a", "allow: [tcp/1-65535], expires: "+early) + rule("c", "allow: [tcp/80-90], expires: "+late),
			"allow POLICY_ALLOW c, allow POLICY_ALLOW c, deny EXPIRED c"},
	} {
		s := Candidate(mustDoc(t, header("app/a", "app/b")+"rules:\n"+row.rules))
		c := mustCompile(t, s)
		var got []string
		for h := -2; h <= 2; h += 2 {
			x := Explain(s, c, mustID(t, "app/a"), mustID(t, "app/b"), policy.Service{Proto: flow.TCP, First: 80, Last: 80}, noon.Add(time.Duration(h)*time.Hour))
			got = append(got, fmt.Sprintf("%v %v %s", x.Verdict, x.Code, x.Rule))
		}
		if text := strings.Join(got, ", "); text != row.want {
			t.Errorf("%s got %s\nwant %s", row.rules, text, row.want)
		}
	}
}
