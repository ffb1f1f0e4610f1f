package reconcile

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// How a peer is added: a Binding in the snapshot, signed by the coordinator and valid now, names a WireGuard key and
// addresses (proto/codec verified it); desiredPeers groups the Bindings by key; Reconciler.peers calls UpdatePeer for
// those that differ from what was made real, after the judge knows their addresses; PrunePeers removes the rest.

// Keepalive is the interval that keeps a NAT's mapping open (WireGuard's own advice).
const Keepalive = 25 * time.Second

// Keepaliver is a Target that can send keepalives to a peer; 0 stops them. One that cannot leaves a host behind NAT
// reachable only while traffic flows.
type Keepaliver interface {
	UpdateKeepalive(ctx context.Context, k key.Public, every time.Duration) error
}

// Denier is a Target with a mode of its own for down; others are given a View that denies everything.
type Denier interface {
	DenyAll(ctx context.Context) error
}

// keepalive is the interval for every peer: needed where the other side cannot begin, because this host is behind NAT.
func keepalive(behindNAT bool) time.Duration {
	if behindNAT {
		return Keepalive
	}
	return 0
}

// desiredPeers says which peers should be real. Endpoints are hints: the last one that worked first.
func desiredPeers(s *mesh.Snapshot, hints map[string][]netip.AddrPort, mode OnLeaseEnd, now time.Time) []mesh.Peer {
	if Shut(s.Self) {
		return nil
	}
	peers, _ := mesh.Peers(usable(s, mode, now), hints, now)
	return peers
}

func samePeer(a, b mesh.Peer) bool {
	return a.Node == b.Node && a.Key == b.Key && a.NotAfter.Equal(b.NotAfter) &&
		slices.Equal(a.AllowedIPs, b.AllowedIPs) && slices.Equal(a.Endpoints, b.Endpoints)
}

func keys(peers []mesh.Peer) []key.Public {
	out := make([]key.Public, len(peers))
	for i, p := range peers {
		out[i] = p.Key
	}
	return out
}

// Router is a Target that can reach workloads in network namespaces of their own, by the devices of this host that lead
// to them. It is told after UpdateHost, always of all addresses. One that cannot leaves such workloads unreachable.
type Router interface {
	UpdateRoutes(ctx context.Context, behind map[netip.Addr]uint32) error
}

// hostAddrs are the addresses that the tunnel device should have, the node's own first, and those that lie behind
// another device, by its index. The addresses of a workload that has, or may have, a network namespace of its own are in
// that namespace, and the tunnel device must not have them: what the host has itself it does not forward.
func hostAddrs(in Input) (addrs []netip.Addr, behind map[netip.Addr]uint32) {
	s := in.Snapshot
	addrs = slices.Clone(s.Self.Addresses)
	if Shut(s.Self) {
		return addrs, nil
	}
	devices := map[identity.Number]uint32{}
	for index, n := range in.Interfaces {
		devices[n] = index
	}
	here := map[identity.Number]bool{}
	for _, n := range in.Locals {
		here[n] = true
	}
	behind = map[netip.Addr]uint32{}
	for _, w := range s.Workloads {
		index, away := devices[w.Number]
		switch {
		case away:
			for _, a := range w.Addresses {
				behind[a] = index
			}
		case here[w.Number] || !mayBeAway(w):
			addrs = append(addrs, w.Addresses...)
		}
	}
	return addrs, behind
}

// mayBeAway reports whether a workload's selectors can match something in a network namespace of its own. While nothing
// matches, such a workload's addresses are nowhere.
func mayBeAway(w mesh.Workload) bool {
	return slices.ContainsFunc(w.Selectors, func(s policy.Selector) bool {
		return s.Kind == policy.SelectInterface || s.Kind == policy.SelectContainer
	})
}

// sameHost compares what UpdateHost is given.
func sameHost(a, b mesh.Self) bool {
	return a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && a.Number == b.Number && slices.Equal(a.Addresses, b.Addresses)
}
