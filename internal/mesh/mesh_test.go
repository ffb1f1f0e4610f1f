package mesh

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

var noon = time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)

func publicKey(t *testing.T) key.Public {
	t.Helper()
	k, err := key.NewPrivate()
	if err != nil {
		t.Fatal(err)
	}
	return k.Public()
}

func binding(n identity.Number, node string, k key.Public, addrs ...string) Binding {
	b := Binding{Number: n, Node: node, Key: k, NotBefore: noon.Add(-time.Hour), NotAfter: noon.Add(time.Hour)}
	for _, a := range addrs {
		b.Addresses = append(b.Addresses, netip.MustParseAddr(a))
	}
	return b
}

func TestBindingValid(t *testing.T) {
	b := binding(300, "a", key.Public{})
	for at, want := range map[time.Time]bool{
		b.NotBefore.Add(-1): false, b.NotBefore: true, noon: true, b.NotAfter.Add(-1): true, b.NotAfter: false,
	} {
		if b.Valid(at) != want {
			t.Errorf("at %v: %v", at, !want)
		}
	}
	if (Binding{}).Valid(noon) {
		t.Error("the zero Binding is valid")
	}
}

func TestPeers(t *testing.T) {
	ka, kb := publicKey(t), publicKey(t)
	soon := binding(301, "a", ka, "198.18.0.2", "fd00::2")
	soon.NotAfter = noon.Add(time.Minute)
	expired := binding(302, "a", ka, "198.18.0.3")
	expired.NotAfter = noon
	early := binding(303, "a", ka, "198.18.0.4")
	early.NotBefore = noon.Add(1)
	ends := map[string][]netip.AddrPort{"b": {netip.MustParseAddrPort("192.0.2.1:51820")}}
	peers, rejected := Peers([]Binding{binding(304, "b", kb, "198.18.0.9"), soon, binding(300, "a", ka, "198.18.0.1", "198.18.0.1"), expired, early}, ends, noon)
	if len(rejected) != 0 || len(peers) != 2 || peers[0].Node != "a" || peers[1].Node != "b" {
		t.Fatalf("got %+v, rejected %+v", peers, rejected)
	}
	want := []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd00::2")}
	if !slices.Equal(peers[0].AllowedIPs, want) || !peers[0].NotAfter.Equal(soon.NotAfter) || peers[0].Key != ka {
		t.Errorf("got %+v", peers[0])
	}
	if len(peers[0].Endpoints) != 0 || len(peers[1].Endpoints) != 1 {
		t.Errorf("endpoints %v and %v", peers[0].Endpoints, peers[1].Endpoints)
	}
}

// TestPeersContradictions: no key stands under two nodes, and no address behind two keys.
func TestPeersContradictions(t *testing.T) {
	ka, kb := publicKey(t), publicKey(t)
	first := binding(300, "a", ka, "198.18.0.1")
	for name, second := range map[string]Binding{
		"key under another node":      binding(301, "b", ka, "198.18.0.2"),
		"address behind another key":  binding(301, "b", kb, "198.18.0.1"),
		"one address of two is taken": binding(301, "b", kb, "198.18.0.7", "198.18.0.1"),
	} {
		peers, rejected := Peers([]Binding{first, second}, nil, noon)
		if len(peers) != 1 || peers[0].Node != "a" || len(rejected) != 1 || rejected[0].Node != "b" {
			t.Errorf("%s: got %+v, rejected %+v", name, peers, rejected)
		}
	}
	if peers, rejected := Peers(nil, nil, noon); len(peers)+len(rejected) != 0 {
		t.Errorf("got %v, %v", peers, rejected)
	}
}

func TestCompare(t *testing.T) {
	h := func(b byte) Hash { return Hash{b} }
	held := []SectionRef{{"a", h(1)}, {"b", h(2)}, {"d", h(4)}, {"c", h(3)}}
	want := []SectionRef{{"e", h(5)}, {"b", h(9)}, {"a", h(1)}}
	d := Compare(held, want)
	if !slices.Equal(d.Changed, []SectionRef{{"e", h(5)}, {"b", h(9)}}) || !slices.Equal(d.Removed, []string{"c", "d"}) {
		t.Errorf("got %+v", d)
	}
	if d := Compare(want, want); len(d.Changed)+len(d.Removed) != 0 {
		t.Errorf("got %+v", d)
	}
	if d := Compare(nil, want); len(d.Changed) != 3 || len(d.Removed) != 0 {
		t.Errorf("got %+v", d)
	}
	if h(0xab).String() != "ab00000000000000" {
		t.Error(h(0xab))
	}
}
