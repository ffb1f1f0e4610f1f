package sessiontest

import (
	"cmp"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/codec"
)

func sortSections(s []codec.Section) {
	slices.SortFunc(s, func(a, b codec.Section) int { return cmp.Compare(a.Ref.Name, b.Ref.Name) })
}

// Numbers of Sample.
const (
	NodeNumber identity.Number = 1000 // node api-1, this host
	APINumber  identity.Number = 1001 // app/api-server, on this host
	PeerNode   identity.Number = 1002 // node db-1
	PGNumber   identity.Number = 1003 // data/postgres, on db-1
	RuleNumber uint32          = 7
)

// Addrs makes the pair of overlay addresses that end in last.
func Addrs(last byte) []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{198, 18, 0, last}), netip.AddrFrom16([16]byte{0xfd, 0x5e, 15: last})}
}

// Sample is a snapshot for node api-1: it runs app/api-server, which may talk with data/postgres on db-1.
func Sample(t testing.TB, epoch uint64, now time.Time, selectors ...string) mesh.Snapshot {
	t.Helper()
	td, err := identity.ParseTrustDomain(Domain)
	check(t, err)
	short := func(s string) identity.ID {
		id, err := td.ParseShort(s)
		check(t, err)
		return id
	}
	node := func(s string) identity.ID {
		id, err := td.Node(s)
		check(t, err)
		return id
	}
	if len(selectors) == 0 {
		selectors = []string{"unit:api-server.service"}
	}
	api := mesh.Workload{ID: short("app/api-server"), Number: APINumber, Addresses: Addrs(5)}
	for _, s := range selectors {
		sel, err := policy.ParseSelector(s)
		check(t, err)
		api.Selectors = append(api.Selectors, sel)
	}
	now = now.Truncate(time.Second)
	binding := func(id identity.ID, n identity.Number, last byte) mesh.Binding {
		return mesh.Binding{ID: id, Number: n, Node: "db-1", Key: PeerKey(t), Addresses: Addrs(last), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), Revision: 1}
	}
	return mesh.Snapshot{
		Manifest: mesh.Manifest{Node: "api-1", Epoch: epoch, PolicyRevision: epoch + 100, IssuedAt: now, LeaseEnds: now.Add(24 * time.Hour)},
		Self: mesh.Self{ID: node("api-1"), Number: NodeNumber, Node: "api-1", Addresses: Addrs(1), Status: "active",
			Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd5e::/48")},
		Workloads: []mesh.Workload{api},
		Bindings:  []mesh.Binding{binding(node("db-1"), PeerNode, 2), binding(short("data/postgres"), PGNumber, 9)},
		Rulesets: map[identity.Number]policy.Ruleset{APINumber: {
			policy.Key{Peer: PGNumber, Port: 5432, Proto: flow.TCP, Dir: policy.Egress}: {Allow: policy.Slot{Rule: RuleNumber}}}},
		Rules:   map[uint32]string{RuleNumber: "api-to-postgres"},
		Names:   map[identity.Number]identity.ID{APINumber: api.ID, PGNumber: short("data/postgres")},
		Revoked: map[netip.Addr]identity.Number{netip.AddrFrom4([4]byte{198, 18, 0, 77}): 1010},
	}
}

// PeerKey is db-1's WireGuard key, the same in each call.
func PeerKey(t testing.TB) key.Public {
	t.Helper()
	raw := make([]byte, key.Size)
	for i := range raw {
		raw[i] = byte(i + 1)
	}
	k, err := key.PrivateFromBytes(raw)
	check(t, err)
	return k.Public()
}
