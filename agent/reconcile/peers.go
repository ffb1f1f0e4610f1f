package reconcile

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
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

// hostAddrs are the addresses that the tunnel device should have, the node's own first.
func hostAddrs(s *mesh.Snapshot) []netip.Addr {
	addrs := slices.Clone(s.Self.Addresses)
	if Shut(s.Self) {
		return addrs
	}
	for _, w := range s.Workloads {
		addrs = append(addrs, w.Addresses...)
	}
	return addrs
}

// sameHost compares what UpdateHost is given.
func sameHost(a, b mesh.Self) bool {
	return a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && a.Number == b.Number && slices.Equal(a.Addresses, b.Addresses)
}
