package publish

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/coordinator/compile"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
)

// bindingKey names a Binding: one for each workload, or the node itself, on a node.
type bindingKey struct {
	number identity.Number
	node   string
}

// desired is what every node should hold, as values.
type desired struct {
	nodes    map[string]desiredNode
	bindings map[bindingKey]mesh.Binding
	next     time.Time // when the first lease window ends; zero without nodes
}

// desiredNode is one node's part. view is nil for a node that gets nothing but its own status.
type desiredNode struct {
	self     mesh.Self
	window   window
	view     *compile.NodeView
	bindings []bindingKey
	revoked  map[netip.Addr]identity.Number
	peers    []string // nodes, sorted
}

// build is pure: the same state, views and time give the same result.
func build(s *registry.State, viewOf func(node string) compile.NodeView, now time.Time) desired {
	b := builder{s: s, now: now, stones: tombstonesOf(s), out: desired{
		nodes: make(map[string]desiredNode, len(s.Nodes)), bindings: map[bindingKey]mesh.Binding{}}}
	for name, n := range s.Nodes {
		d := desiredNode{window: windowAt(name, s.Lease, now), self: mesh.Self{
			ID: n.ID, Number: n.Number, Node: name, Addresses: []netip.Addr{n.IPv4, n.IPv6},
			Overlay4: s.Overlay4, Overlay6: s.Overlay6, Status: string(n.Status)}}
		if n.Status == registry.NodeActive {
			b.active(name, &d, viewOf(name))
		}
		if n.Status != registry.NodeRevoked && (b.out.next.IsZero() || d.window.next.Before(b.out.next)) {
			b.out.next = d.window.next
		}
		b.out.nodes[name] = d
	}
	return b.out
}

type builder struct {
	s      *registry.State
	now    time.Time
	stones tombstones
	out    desired
}

func (b *builder) active(name string, d *desiredNode, v compile.NodeView) {
	d.view = &v
	seen := map[string]bool{}
	for _, inst := range v.Peers {
		n, ok := b.s.Nodes[inst.Node]
		if !ok || inst.Node == name || inst.Revoked || n.Status != registry.NodeActive {
			continue
		}
		d.bindings = append(d.bindings, b.workload(inst, n))
		if !seen[inst.Node] {
			seen[inst.Node] = true
			d.bindings = append(d.bindings, b.node(n))
		}
	}
	d.peers = slices.Sorted(maps.Keys(seen))
	slices.SortFunc(d.bindings, func(x, y bindingKey) int {
		return cmp.Or(cmp.Compare(x.number, y.number), cmp.Compare(x.node, y.node))
	})
	d.bindings = slices.Compact(d.bindings)
	d.revoked = b.stones.seenBy(v)
}

func (b *builder) workload(inst registry.Instance, n registry.Node) bindingKey {
	return b.bind(inst.Workload, inst.Number, n, []netip.Addr{inst.IPv4, inst.IPv6}, max(inst.Revision, n.Revision))
}

func (b *builder) node(n registry.Node) bindingKey {
	return b.bind(n.ID, n.Number, n, []netip.Addr{n.IPv4, n.IPv6}, n.Revision)
}

func (b *builder) bind(id identity.ID, num identity.Number, n registry.Node, addrs []netip.Addr, rev uint64) bindingKey {
	k := bindingKey{num, n.Name}
	if _, ok := b.out.bindings[k]; !ok {
		w := windowAt(n.Name, b.s.Lease, b.now)
		b.out.bindings[k] = mesh.Binding{ID: id, Number: num, Node: n.Name, Key: n.Key, Addresses: addrs,
			NotBefore: w.notBefore, NotAfter: w.notAfter, Revision: rev}
	}
	return k
}

// tombstones add to what a view has buried: with a workload's address on a revoked node, that node's own. They follow
// from the state alone, so that a restarted coordinator remembers them.
type tombstones struct {
	hosts map[netip.Addr]registry.Node // revoked nodes, by the addresses of their workloads
	used  map[netip.Addr]bool
}

func tombstonesOf(s *registry.State) tombstones {
	t := tombstones{map[netip.Addr]registry.Node{}, map[netip.Addr]bool{}}
	for _, n := range s.Nodes {
		if n.Status != registry.NodeRevoked {
			t.used[n.IPv4], t.used[n.IPv6] = true, true
		}
	}
	for _, inst := range s.Instances {
		n, ok := s.Nodes[inst.Node]
		switch {
		case ok && n.Status == registry.NodeRevoked:
			t.hosts[inst.IPv4], t.hosts[inst.IPv6] = n, n
		case !inst.Revoked:
			t.used[inst.IPv4], t.used[inst.IPv6] = true, true
		}
	}
	return t
}

// seenBy returns the tombstones that a view's node should know. An address that was given to someone else since is no
// tombstone any more.
func (t tombstones) seenBy(v compile.NodeView) map[netip.Addr]identity.Number {
	out := make(map[netip.Addr]identity.Number, len(v.Revoked))
	add := func(a netip.Addr, n identity.Number) {
		if a.IsValid() && !t.used[a] {
			out[a] = n
		}
	}
	for a, n := range v.Revoked {
		add(a, n)
		if host, ok := t.hosts[a]; ok {
			add(host.IPv4, host.Number)
			add(host.IPv6, host.Number)
		}
	}
	return out
}
