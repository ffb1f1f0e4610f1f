package publish

import (
	"bytes"
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/codec"
)

// cell is a value with its encoding. As long as the value stays the same, so do the bytes, and nobody pays for them
// again.
type cell[T any] struct {
	value   T
	section *codec.Section
}

// encoder keeps one generation of cells. next makes the following one, taking over what did not change; what no node
// needs any more is left behind with the old generation.
type encoder struct {
	sign     codec.Sign
	cert     []byte // the distribution certificate; another one means another key, and no signature may be kept
	bindings map[bindingKey]*cell[mesh.Binding]
	rulesets map[identity.Number]*cell[policy.Ruleset]
	nodes    map[string]nodeCells
	encoded  uint64 // sections encoded so far
}

type nodeCells struct {
	self      *cell[mesh.Self]
	workloads *cell[[]mesh.Workload]
	names     *cell[names]
	revoked   *cell[map[netip.Addr]identity.Number]
}

type names struct {
	ids   map[identity.Number]identity.ID
	rules map[uint32]string
}

func (e *encoder) next(d desired, sign codec.Sign, cert []byte) *encoder {
	n := &encoder{sign: sign, cert: cert, encoded: e.encoded,
		bindings: make(map[bindingKey]*cell[mesh.Binding], len(d.bindings)),
		rulesets: make(map[identity.Number]*cell[policy.Ruleset], len(e.rulesets)),
		nodes:    make(map[string]nodeCells, len(d.nodes))}
	known := e.bindings
	if !bytes.Equal(e.cert, cert) {
		known = nil
	}
	for k, b := range d.bindings {
		n.bindings[k] = reuse(n, known[k], b, equalBindings, func(b mesh.Binding) codec.Section { return codec.EncodeBinding(b, sign) })
	}
	for name, dn := range d.nodes {
		n.nodes[name] = n.node(e, e.nodes[name], dn)
	}
	return n
}

func (e *encoder) node(before *encoder, old nodeCells, d desiredNode) nodeCells {
	out := nodeCells{self: reuse(e, old.self, d.self, equalSelves, codec.EncodeSelf)}
	if d.view == nil {
		return out
	}
	out.workloads = reuse(e, old.workloads, d.view.Workloads, equalWorkloads, codec.EncodeWorkloads)
	out.names = reuse(e, old.names, names{d.view.Names, d.view.Rules}, equalNames,
		func(n names) codec.Section { return codec.EncodeNames(n.ids, n.rules) })
	out.revoked = reuse(e, old.revoked, d.revoked, maps.Equal, codec.EncodeRevoked)
	for num, rs := range d.view.Rulesets {
		// A workload has one ruleset, on whatever node it runs.
		if e.rulesets[num] == nil {
			e.rulesets[num] = reuse(e, before.rulesets[num], rs, maps.Equal,
				func(rs policy.Ruleset) codec.Section { return codec.EncodeRuleset(num, rs) })
		}
	}
	return out
}

// sections lists what a node should hold, sorted by name, as manifests want it.
func (e *encoder) sections(name string, d desiredNode) []*codec.Section {
	c := e.nodes[name]
	out := []*codec.Section{c.self.section}
	if d.view != nil {
		out = append(out, c.workloads.section, c.names.section, c.revoked.section)
		for num := range d.view.Rulesets {
			out = append(out, e.rulesets[num].section)
		}
		for _, k := range d.bindings {
			out = append(out, e.bindings[k].section)
		}
	}
	slices.SortFunc(out, func(a, b *codec.Section) int { return cmp.Compare(a.Ref.Name, b.Ref.Name) })
	return out
}

func reuse[T any](e *encoder, old *cell[T], v T, equal func(a, b T) bool, encode func(T) codec.Section) *cell[T] {
	if old != nil && equal(old.value, v) {
		return old
	}
	e.encoded++
	s := encode(v)
	if old != nil && old.section.Ref == s.Ref && bytes.Equal(old.section.Body, s.Body) {
		return &cell[T]{v, old.section}
	}
	return &cell[T]{v, &s}
}

func equalBindings(a, b mesh.Binding) bool {
	return a.ID == b.ID && a.Number == b.Number && a.Node == b.Node && a.Key == b.Key && a.Revision == b.Revision &&
		a.NotBefore.Equal(b.NotBefore) && a.NotAfter.Equal(b.NotAfter) && slices.Equal(a.Addresses, b.Addresses)
}

func equalSelves(a, b mesh.Self) bool {
	return a.ID == b.ID && a.Number == b.Number && a.Node == b.Node && a.Status == b.Status &&
		a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && slices.Equal(a.Addresses, b.Addresses)
}

func equalWorkloads(a, b []mesh.Workload) bool {
	return slices.EqualFunc(a, b, func(x, y mesh.Workload) bool {
		return x.ID == y.ID && x.Number == y.Number && x.Traits == y.Traits && slices.Equal(x.Addresses, y.Addresses) && slices.Equal(x.Selectors, y.Selectors)
	})
}

func equalNames(a, b names) bool { return maps.Equal(a.ids, b.ids) && maps.Equal(a.rules, b.rules) }
