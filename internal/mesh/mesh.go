package mesh

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/policy"
)

// Binding is the coordinator's signed statement: this ID, on this node, is at these overlay addresses behind this
// WireGuard key, from NotBefore to NotAfter. An expired Binding is an expired certificate.
type Binding struct {
	ID        identity.ID
	Number    identity.Number
	Node      string
	Key       key.Public
	Addresses []netip.Addr // one IPv4, one IPv6
	NotBefore time.Time
	NotAfter  time.Time
	Revision  uint64 // store revision of the last change to what it says
}

// Valid reports whether the Binding counts at now.
func (b Binding) Valid(now time.Time) bool {
	return !now.Before(b.NotBefore) && now.Before(b.NotAfter)
}

// Workload is one of the host's own workloads.
type Workload struct {
	ID        identity.ID
	Number    identity.Number
	Addresses []netip.Addr // one IPv4, one IPv6
	Selectors []policy.Selector
	Traits    policy.Traits
}

// Self says what the host itself is in the mesh.
type Self struct {
	ID        identity.ID
	Number    identity.Number
	Node      string
	Addresses []netip.Addr
	Overlay4  netip.Prefix
	Overlay6  netip.Prefix
	// Status is the node's standing: pending and revoked nodes have no workloads.
	Status string
}

// Hash is the SHA-256 of a section's bytes.
type Hash [sha256.Size]byte

// String is the first 8 bytes in hex, for logs.
func (h Hash) String() string { return hex.EncodeToString(h[:8]) }

// SectionRef names one content-addressed part of a Snapshot.
type SectionRef struct {
	Name string
	Hash Hash
}

// Manifest is what the coordinator signs for one agent: the epoch, the lease, and the hash of every section.
type Manifest struct {
	Node           string
	Epoch          uint64 // only ever grows
	PolicyRevision uint64
	IssuedAt       time.Time
	LeaseEnds      time.Time
	Sections       []SectionRef // sorted by name
}

// Snapshot is everything that one agent should make real. It is only built from a verified Manifest and sections that
// hash to what it says.
type Snapshot struct {
	Manifest  Manifest
	Self      Self
	Workloads []Workload                         // sorted by Number
	Bindings  []Binding                          // of peers' workloads and nodes, sorted by Number, then Node
	Rulesets  map[identity.Number]policy.Ruleset // by own workload
	Rules     map[uint32]string                  // rule names by number
	Revoked   map[netip.Addr]identity.Number     // tombstones of addresses that were taken back
	Names     map[identity.Number]identity.ID    // every identity that the rulesets mention
}

// Peer is what WireGuard needs to reach another agent.
type Peer struct {
	Node       string
	Key        key.Public
	AllowedIPs []netip.Addr // exactly what the peer's valid Bindings say, sorted
	Endpoints  []netip.AddrPort
	NotAfter   time.Time // the earliest end of its Bindings
}

// Peers groups the Bindings that are valid at now by key. A Binding whose key stands under two nodes, or whose address
// is claimed by two keys, is a contradiction that no honest coordinator signs: the later one in order is left out and
// returned in rejected.
func Peers(bindings []Binding, endpoints map[string][]netip.AddrPort, now time.Time) (peers []Peer, rejected []Binding) {
	byKey := map[key.Public]*Peer{}
	owner := map[netip.Addr]key.Public{}
	for _, b := range bindings {
		if !b.Valid(now) {
			continue
		}
		p := byKey[b.Key]
		if p != nil && p.Node != b.Node || taken(owner, b) {
			rejected = append(rejected, b)
			continue
		}
		if p == nil {
			p = &Peer{Node: b.Node, Key: b.Key, Endpoints: endpoints[b.Node], NotAfter: b.NotAfter}
			byKey[b.Key] = p
		}
		for _, a := range b.Addresses {
			owner[a] = b.Key
			p.AllowedIPs = append(p.AllowedIPs, a)
		}
		if b.NotAfter.Before(p.NotAfter) {
			p.NotAfter = b.NotAfter
		}
	}
	for _, p := range byKey {
		slices.SortFunc(p.AllowedIPs, netip.Addr.Compare)
		p.AllowedIPs = slices.Compact(p.AllowedIPs)
		peers = append(peers, *p)
	}
	slices.SortFunc(peers, func(a, b Peer) int { return cmp.Compare(a.Node, b.Node) })
	return peers, rejected
}

func taken(owner map[netip.Addr]key.Public, b Binding) bool {
	for _, a := range b.Addresses {
		if k, ok := owner[a]; ok && k != b.Key {
			return true
		}
	}
	return false
}

// Diff says how to get from one manifest's sections to another's.
type Diff struct {
	Changed []SectionRef // new or with another hash
	Removed []string
}

// Compare lists what changes from held to want. Both may be in any order.
func Compare(held, want []SectionRef) Diff {
	have := make(map[string]Hash, len(held))
	for _, s := range held {
		have[s.Name] = s.Hash
	}
	var d Diff
	for _, s := range want {
		if h, ok := have[s.Name]; !ok || h != s.Hash {
			d.Changed = append(d.Changed, s)
		}
		delete(have, s.Name)
	}
	d.Removed = slices.Sorted(maps.Keys(have))
	return d
}
