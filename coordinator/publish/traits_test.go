package publish

import (
	"testing"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

const audited = `
zones: [{name: app}, {name: data, internet: deny}]
workloads:
  - {id: app/api, selectors: ["unit:api.service"], nodes: ["api-*"]}
  - {id: app/hook, selectors: ["unit:hook.service"], nodes: ["api-*"]}
  - {id: data/db, selectors: ["unit:db.service"], nodes: ["db-*"], listen: overlay}
rules:
  - {id: api-to-db, from: [app/api], to: [data/db], allow: [tcp/1024-65535], mode: audit, expires: 2027-01-31T00:00:00Z}
  - {id: hook-to-db, from: [app/api], to: [data/db], deny: [tcp/5432], mode: audit}
`

// TestTraitsAndModesReachTheNode: from the document to what an agent reads, and only to the nodes that they concern.
func TestTraitsAndModesReachTheNode(t *testing.T) {
	src, sg := newSource(t, "api-1", "db-1"), newSigner()
	p := start(t, src, sg)
	before := p.Counts()
	src.change(func(s *registry.State) { s.Policy = testDocument(t, audited) })
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	// Two rulesets, the names of both nodes, the workloads of one: app/api stays as it was.
	if n := p.Counts().Encoded - before.Encoded; n != 5 {
		t.Errorf("%d sections were encoded, expected 5", n)
	}
	db := snapshot(t, p.Current().Nodes["db-1"], sg)
	if w := db.Workloads; len(w) != 1 || w[0].Traits != (policy.Traits{Confined: true, OverlayOnly: true}) {
		t.Errorf("workloads %+v", w)
	}
	rs := db.Rulesets[302]
	ranged := rs[policy.Key{Peer: 300, Proto: flow.TCP, Port: 1024, Bits: 6, Dir: policy.Ingress}]
	if len(rs) != 7 || ranged.Allow.Rule != 1 || !ranged.Allow.Audit || ranged.Allow.NotAfter.IsZero() {
		t.Errorf("%d entries, %+v", len(rs), ranged)
	}
	one := rs[policy.Key{Peer: 300, Proto: flow.TCP, Port: 5432, Dir: policy.Ingress}]
	if one.Audit.Rule != 2 || one.Allow != ranged.Allow || one.Deny.Present() {
		t.Errorf("port in the range: %+v", one)
	}
	if db.Rules[1] != "api-to-db" || db.Rules[2] != "hook-to-db" {
		t.Errorf("rules %v", db.Rules)
	}
	if w := snapshot(t, p.Current().Nodes["api-1"], sg).Workloads; len(w) != 2 || w[0].Traits != (policy.Traits{}) {
		t.Errorf("workloads %+v", w)
	}
}
