package session

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/signet-overlay/signet/proto/signetv1"
)

// maxEndpoints bounds what one node may advertise; more are left out.
const maxEndpoints = 16

// directory knows where nodes may be reached: unsigned hints, kept in memory, for as long as the node exists.
type directory struct {
	mu      sync.Mutex
	version uint64 // grows with each change
	nodes   map[string]place
}

type place struct {
	endpoints []netip.AddrPort
	version   uint64 // of the directory when they last changed
}

// set reports whether anything changed.
func (d *directory) set(node string, endpoints []netip.AddrPort) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if slices.Equal(d.nodes[node].endpoints, endpoints) {
		return false
	}
	d.version++
	d.nodes[node] = place{endpoints, d.version}
	return true
}

// forget drops a node that has left the mesh.
func (d *directory) forget(node string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.nodes, node)
}

func (d *directory) of(node string) []netip.AddrPort {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.nodes[node].endpoints
}

// since lists the peers whose endpoints changed after version, or that are not among known (sorted).
func (d *directory) since(peers []string, version uint64, known []string) (out []*signetv1.NodeEndpoints, latest uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if version == d.version && slices.Equal(peers, known) {
		return nil, version
	}
	for _, p := range peers {
		at, ok := d.nodes[p]
		if !ok || at.version <= version && found(known, p) {
			continue
		}
		ne := &signetv1.NodeEndpoints{Node: p}
		for _, e := range at.endpoints {
			ne.Endpoints = append(ne.Endpoints, e.String())
		}
		out = append(out, ne)
	}
	return out, d.version
}

func found(sorted []string, s string) bool {
	_, ok := slices.BinarySearch(sorted, s)
	return ok
}

// candidates puts together what a node said of itself and the address that the coordinator saw. Its own come first:
// they hold inside its network, where the seen one may be a NAT's outside. A loopback address means that the agent
// runs beside the coordinator, and would send other hosts to themselves; it counts only when there is nothing else.
func candidates(reported []netip.AddrPort, seen netip.Addr, port uint16) []netip.AddrPort {
	out := slices.Clone(reported)
	if seen = seen.Unmap(); port != 0 && (seen.IsGlobalUnicast() || seen.IsLoopback() && len(out) == 0) {
		if ap := netip.AddrPortFrom(seen, port); !slices.Contains(out, ap) {
			out = append(out[:min(len(out), maxEndpoints-1)], ap)
		}
	}
	return out
}
