package compile

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// NodeView is what one node's agent must know, and nothing else: its interest set. It shares its rulesets with the
// Compiled.
type NodeView struct {
	Node      registry.Node
	Workloads []mesh.Workload // own, sorted by Number; none unless the node is active
	Rulesets  map[identity.Number]policy.Ruleset
	// Peers are the instances, on other active nodes, of every workload that a ruleset mentions; sorted by Number, then
	// node.
	Peers     []registry.Instance
	PeerNodes []registry.Node // the nodes of Peers, sorted by name
	Rules     map[uint32]string
	Names     map[identity.Number]identity.ID // own workloads and everything that the rulesets mention
	Revoked   map[netip.Addr]identity.Number  // tombstones of own instances and of Peers' workloads
}

// For returns what the node's agent must know. A node that is unknown, pending or revoked has an empty view.
func (c *Compiled) For(node string) NodeView {
	v := NodeView{
		Node:     c.state.Nodes[node],
		Rulesets: map[identity.Number]policy.Ruleset{},
		Rules:    map[uint32]string{},
		Names:    map[identity.Number]identity.ID{},
		Revoked:  map[netip.Addr]identity.Number{},
	}
	if v.Node.Status != registry.NodeActive {
		return v
	}
	mentioned := map[identity.Number]bool{}
	for _, i := range c.onNode[node] {
		w, ok := c.index.Workload(i.Workload)
		if i.Revoked {
			v.bury(i)
			continue
		}
		if !ok {
			continue // the document dropped it, and the registry has not followed yet
		}
		v.Workloads = append(v.Workloads, mesh.Workload{ID: i.Workload, Number: i.Number, Addresses: addresses(i), Selectors: w.Selectors, Traits: c.traits(w)})
		v.Names[i.Number] = i.Workload
		rs := c.Rulesets[i.Number]
		if len(rs) == 0 {
			continue
		}
		v.Rulesets[i.Number] = rs
		for k, val := range rs {
			mentioned[k.Peer] = true
			for _, rule := range [...]uint32{val.Allow.Rule, val.Deny.Rule, val.Audit.Rule} {
				if rule != 0 {
					v.Rules[rule] = c.Rules[rule]
				}
			}
		}
	}
	slices.SortFunc(v.Workloads, func(a, b mesh.Workload) int { return cmp.Compare(a.Number, b.Number) })
	c.peers(&v, mentioned)
	return v
}

// traits are what the workload's zone and the workload itself ask for.
func (c *Compiled) traits(w *policydoc.Workload) policy.Traits {
	return policy.Traits{Confined: c.confined[w.ID.Zone()], OverlayOnly: w.OverlayOnly}
}

func (c *Compiled) peers(v *NodeView, mentioned map[identity.Number]bool) {
	nodes := map[string]registry.Node{}
	for n := range mentioned {
		v.Names[n] = c.Names[n]
		for _, i := range c.placed[n] {
			node, ok := c.state.Nodes[i.Node]
			switch {
			case !ok:
			case i.Revoked || node.Status == registry.NodeRevoked:
				v.bury(i)
			case node.Status == registry.NodeActive && i.Node != v.Node.Name:
				v.Peers = append(v.Peers, i)
				nodes[i.Node] = node
			}
		}
	}
	slices.SortFunc(v.Peers, func(a, b registry.Instance) int {
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Node, b.Node))
	})
	v.PeerNodes = slices.SortedFunc(maps.Values(nodes), func(a, b registry.Node) int { return cmp.Compare(a.Name, b.Name) })
}

// bury leaves a tombstone, so that the refusal can say REVOKED instead of UNKNOWN_PEER.
func (v *NodeView) bury(i registry.Instance) {
	for _, a := range addresses(i) {
		v.Revoked[a] = i.Number
	}
}

func addresses(i registry.Instance) []netip.Addr {
	out := make([]netip.Addr, 0, 2)
	for _, a := range [...]netip.Addr{i.IPv4, i.IPv6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// View is the same as a policy.View, for reference: what the node's judge would hold with Bindings that never expire.
// Which sockets and devices belong to which workload only the host knows; the caller fills in Locals and Interfaces.
func (c *Compiled) View(node string) *policy.View {
	nv := c.For(node)
	v := &policy.View{
		Overlay4: c.state.Overlay4, Overlay6: c.state.Overlay6, Revision: c.state.PolicyRevision,
		Addresses: map[netip.Addr]policy.Address{}, Locals: map[policy.LocalKey]identity.Number{}, Rulesets: nv.Rulesets,
		Traits: map[identity.Number]policy.Traits{},
	}
	for _, w := range nv.Workloads {
		if w.Traits != (policy.Traits{}) {
			v.Traits[w.Number] = w.Traits
		}
		for _, a := range w.Addresses {
			v.Addresses[a] = policy.Address{Number: w.Number, Local: true}
		}
	}
	for _, i := range nv.Peers {
		for _, a := range addresses(i) {
			v.Addresses[a] = policy.Address{Number: i.Number}
		}
	}
	for a, n := range nv.Revoked {
		v.Addresses[a] = policy.Address{Number: n, Revoked: true}
	}
	return v
}
