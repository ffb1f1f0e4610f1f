package codec_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// world is a coordinator reduced to its distribution key.
type world struct {
	td   identity.TrustDomain
	priv ed25519.PrivateKey
	now  time.Time
}

func newWorld(t testing.TB) *world {
	t.Helper()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	seed := sha256.Sum256([]byte("distribution"))
	return &world{td, ed25519.NewKeyFromSeed(seed[:]), time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)}
}

func (w *world) sign(m []byte) []byte { return ed25519.Sign(w.priv, m) }

func (w *world) trust(node string) codec.Trust {
	return codec.Trust{TrustDomain: w.td, Node: node, Distribution: func(der []byte) (ed25519.PublicKey, error) {
		if string(der) != "certificate" {
			return nil, errors.New("not certified")
		}
		return w.priv.Public().(ed25519.PublicKey), nil
	}}
}

func addrs(last byte) []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{198, 18, 0, last}), netip.MustParseAddr(fmt.Sprintf("fd00:5e77::%x", last))}
}

func (w *world) id(t testing.TB, short string) identity.ID {
	t.Helper()
	id, err := w.td.ParseShort(short)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (w *world) binding(t testing.TB) mesh.Binding {
	return mesh.Binding{ID: w.id(t, "data/postgres"), Number: 301, Node: "db-1", Key: publicKey(t, 7), Addresses: addrs(9),
		NotBefore: w.now, NotAfter: w.now.Add(24 * time.Hour), Revision: 12}
}

func publicKey(t testing.TB, b byte) key.Public {
	t.Helper()
	p, err := key.PublicFromBytes(bytes.Repeat([]byte{b}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *world) self(t testing.TB, status string) mesh.Self {
	t.Helper()
	id, err := w.td.Node("api-1")
	if err != nil {
		t.Fatal(err)
	}
	return mesh.Self{ID: id, Number: 256, Node: "api-1", Addresses: addrs(1), Status: status,
		Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd00:5e77::/48")}
}

func selector(t testing.TB, text string) policy.Selector {
	t.Helper()
	s, err := policy.ParseSelector(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sections is a small but complete snapshot for node api-1.
func (w *world) sections(t testing.TB) []codec.Section {
	t.Helper()
	api := w.id(t, "app/api-server")
	sel, device := selector(t, "unit:api.service"), selector(t, "interface:tap0")
	return []codec.Section{
		codec.EncodeBinding(w.binding(t), w.sign),
		codec.EncodeNames(map[identity.Number]identity.ID{300: api, 301: w.id(t, "data/postgres")}, map[uint32]string{4: "api-to-postgres"}),
		codec.EncodeRevoked(map[netip.Addr]identity.Number{netip.MustParseAddr("198.18.0.77"): 310}),
		codec.EncodeRuleset(300, policy.Ruleset{
			{Peer: 301, Proto: flow.TCP, Port: 5432}:                               {Allow: policy.Slot{Rule: 4, NotAfter: w.now.Add(time.Hour), Audit: true}},
			{Peer: 301, Proto: flow.TCP, Port: 1024, Bits: 6, Dir: policy.Ingress}: {Allow: policy.Slot{Rule: 4}, Audit: policy.Slot{Rule: 5, NotBefore: w.now}},
			{Peer: 301, Proto: flow.SCTP, Bits: 1}:                                 {Deny: policy.Slot{Rule: 6}},
		}),
		codec.EncodeSelf(w.self(t, "active")),
		codec.EncodeWorkloads([]mesh.Workload{
			{ID: api, Number: 300, Addresses: addrs(5), Selectors: []policy.Selector{sel}, Traits: policy.Traits{OverlayOnly: true}},
			{ID: w.id(t, "data/guest"), Number: 302, Addresses: addrs(6), Selectors: []policy.Selector{device}, Traits: policy.Traits{Confined: true}},
		}),
	}
}

func (w *world) update(epoch uint64, all []codec.Section, sent ...codec.Section) *signetv1.Update {
	m := mesh.Manifest{Node: "api-1", Epoch: epoch, PolicyRevision: 3, IssuedAt: w.now, LeaseEnds: w.now.Add(24 * time.Hour)}
	for _, s := range all {
		m.Sections = append(m.Sections, s.Ref)
	}
	u := &signetv1.Update{Manifest: codec.EncodeManifest(m, w.td, w.sign), DistributionCertificate: []byte("certificate")}
	for _, s := range sent {
		u.Sections = append(u.Sections, &signetv1.Section{Name: s.Ref.Name, Body: bytes.Clone(s.Body)})
	}
	return u
}

func (w *world) held(t testing.TB) *codec.Held {
	t.Helper()
	all := w.sections(t)
	h, err := codec.Apply(nil, w.update(5, all, all...), w.trust("api-1"))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestApplyGivesBackWhatWasEncoded(t *testing.T) {
	w := newWorld(t)
	s := w.held(t).Snapshot
	if len(s.Bindings) != 1 || s.Bindings[0].Key != publicKey(t, 7) || !s.Bindings[0].NotAfter.Equal(w.now.Add(24*time.Hour)) {
		t.Errorf("bindings = %+v", s.Bindings)
	}
	slot := s.Rulesets[300][policy.Key{Peer: 301, Proto: flow.TCP, Port: 5432}].Allow
	if slot.Rule != 4 || !slot.NotAfter.Equal(w.now.Add(time.Hour)) || !slot.NotBefore.IsZero() || !slot.Audit {
		t.Errorf("slot = %+v", slot)
	}
	ranged := s.Rulesets[300][policy.Key{Peer: 301, Proto: flow.TCP, Port: 1024, Bits: 6, Dir: policy.Ingress}]
	if ranged.Allow != (policy.Slot{Rule: 4}) || ranged.Audit.Rule != 5 || !ranged.Audit.NotBefore.Equal(w.now) || ranged.Deny.Present() {
		t.Errorf("range = %+v", ranged)
	}
	if len(s.Rulesets[300]) != 3 || s.Rulesets[300][policy.Key{Peer: 301, Proto: flow.SCTP, Bits: 1}].Deny.Rule != 6 {
		t.Errorf("ruleset = %+v", s.Rulesets[300])
	}
	if s.Workloads[0].Traits != (policy.Traits{OverlayOnly: true}) || s.Workloads[1].Traits != (policy.Traits{Confined: true}) || s.Workloads[1].Selectors[0].Value != "tap0" {
		t.Errorf("workloads = %+v", s.Workloads)
	}
	if s.Self.Node != "api-1" || s.Workloads[0].Selectors[0].String() != "unit:api.service" || s.Rules[4] != "api-to-postgres" {
		t.Errorf("snapshot = %+v", s)
	}
	if s.Revoked[netip.MustParseAddr("198.18.0.77")] != 310 || s.Manifest.PolicyRevision != 3 {
		t.Errorf("snapshot = %+v", s)
	}
}

func TestDeltaCarriesOnlyWhatChanged(t *testing.T) {
	w := newWorld(t)
	held, all := w.held(t), w.sections(t)
	all[3] = codec.EncodeRuleset(300, policy.Ruleset{{Peer: 301}: {Deny: policy.Slot{Rule: 9}}})
	next, err := codec.Apply(held, w.update(6, all, all[3]), w.trust("api-1"))
	if err != nil {
		t.Fatal(err)
	}
	if next.Snapshot.Rulesets[300][policy.Key{Peer: 301}].Deny.Rule != 9 || held.Snapshot.Rulesets[300][policy.Key{Peer: 301}].Deny.Present() {
		t.Error("the delta did not replace the ruleset, or changed what was held")
	}
	gone, err := codec.Apply(next, w.update(7, all[1:]), w.trust("api-1"))
	if err != nil || len(gone.Snapshot.Bindings) != 0 {
		t.Errorf("a section that the manifest leaves out stayed: %v %v", gone, err)
	}
}

// TestUnchangedRulesetsAreShared: what was made of one can be kept.
func TestUnchangedRulesetsAreShared(t *testing.T) {
	w := newWorld(t)
	held, all := w.held(t), w.sections(t)
	same := func(a, b *codec.Held) bool {
		return reflect.ValueOf(a.Snapshot.Rulesets[300]).Pointer() == reflect.ValueOf(b.Snapshot.Rulesets[300]).Pointer()
	}
	next, err := codec.Apply(held, w.update(6, all, all...), w.trust("api-1"))
	if err != nil || !same(held, next) {
		t.Errorf("an unchanged ruleset was made anew: %v", err)
	}
	all[3] = codec.EncodeRuleset(300, policy.Ruleset{{Peer: 301}: {Deny: policy.Slot{Rule: 9}}})
	last, err := codec.Apply(next, w.update(7, all, all[3]), w.trust("api-1"))
	if err != nil || same(next, last) || len(last.Snapshot.Rulesets[300]) != 1 {
		t.Errorf("a changed ruleset was kept: %v", err)
	}
	gone, err := codec.Apply(last, w.update(8, append(append([]codec.Section{}, all[:3]...), all[4:]...)), w.trust("api-1"))
	if err != nil || len(gone.Snapshot.Rulesets) != 0 {
		t.Errorf("a ruleset that the manifest leaves out stayed: %v", err)
	}
}

func TestSavedSnapshotLoads(t *testing.T) {
	w := newWorld(t)
	h := w.held(t)
	again, err := codec.Load(h.Marshal(), w.trust("api-1"))
	if err != nil || again.Epoch() != h.Epoch() || len(mesh.Compare(h.Sections(), again.Sections()).Changed) != 0 {
		t.Fatalf("loaded %v, %v", again, err)
	}
}

//house:allow-long one table of forged updates
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	all := w.sections(t)
	other := *w
	seed := sha256.Sum256([]byte("someone else"))
	other.priv = ed25519.NewKeyFromSeed(seed[:])
	for name, c := range map[string]struct {
		held *codec.Held
		make func() *signetv1.Update
		node string
		want error
	}{
		"signed by another key": {make: func() *signetv1.Update { return other.update(5, all, all...) }, want: codec.ErrSignature},
		"binding signed by another key": {make: func() *signetv1.Update {
			s := append([]codec.Section{}, all...)
			s[0] = codec.EncodeBinding(w.binding(t), other.sign)
			return w.update(5, s, s...)
		}, want: codec.ErrSignature},
		"manifest signature used for a binding": {make: func() *signetv1.Update {
			s := append([]codec.Section{}, all...)
			b, _ := proto.Marshal(w.update(5, all).Manifest)
			s[0] = codec.Section{Ref: mesh.SectionRef{Name: s[0].Ref.Name, Hash: sha256.Sum256(b)}, Body: b}
			return w.update(5, s, s...)
		}, want: codec.ErrSignature},
		"for another node":  {make: func() *signetv1.Update { return w.update(5, all, all...) }, node: "api-2", want: codec.ErrForeign},
		"older epoch":       {held: w.held(t), make: func() *signetv1.Update { return w.update(4, all, all...) }, want: codec.ErrRollback},
		"same epoch, other": {held: w.held(t), make: func() *signetv1.Update { return w.update(5, all[1:], all[1:]...) }, want: codec.ErrRollback},
		"missing section":   {make: func() *signetv1.Update { return w.update(5, all, all[1:]...) }, want: codec.ErrHash},
		"changed body":      {make: func() *signetv1.Update { u := w.update(5, all, all...); u.Sections[3].Body[0] ^= 1; return u }, want: codec.ErrHash},
		"no self": {make: func() *signetv1.Update {
			s := append(append([]codec.Section{}, all[:4]...), all[5])
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"status that no agent knows": {make: func() *signetv1.Update {
			s := append([]codec.Section{}, all...)
			s[4] = codec.EncodeSelf(w.self(t, "suspended"))
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"no status": {make: func() *signetv1.Update {
			s := append([]codec.Section{}, all...)
			s[4] = codec.EncodeSelf(w.self(t, ""))
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"epoch zero": {make: func() *signetv1.Update { return w.update(0, all, all...) }, want: codec.ErrMalformed},
		"ruleset of no own workload": {make: func() *signetv1.Update {
			s := append([]codec.Section{}, all...)
			s[3] = codec.EncodeRuleset(999, policy.Ruleset{{Peer: 301}: {Allow: policy.Slot{Rule: 1}}})
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"address of the host itself claimed": {make: func() *signetv1.Update {
			s, b := append([]codec.Section{}, all...), w.binding(t)
			b.Addresses = addrs(1)
			s[0] = codec.EncodeBinding(b, w.sign)
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"address outside the overlay": {make: func() *signetv1.Update {
			s, b := append([]codec.Section{}, all...), w.binding(t)
			b.Addresses = []netip.Addr{netip.MustParseAddr("192.0.2.1"), b.Addresses[1]}
			s[0] = codec.EncodeBinding(b, w.sign)
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"binding for ten years": {make: func() *signetv1.Update {
			s, b := append([]codec.Section{}, all...), w.binding(t)
			b.NotAfter = b.NotBefore.AddDate(10, 0, 0)
			s[0] = codec.EncodeBinding(b, w.sign)
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"binding under another's name": {make: func() *signetv1.Update {
			s := append([]codec.Section{}, all...)
			s[0].Ref.Name = "binding/301/db-2"
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"unknown section": {make: func() *signetv1.Update {
			s := append(append([]codec.Section{}, all...), codec.Section{Ref: mesh.SectionRef{Name: "zzz", Hash: sha256.Sum256(nil)}})
			return w.update(5, s, s...)
		}, want: codec.ErrMalformed},
		"another trust domain's identity": {make: func() *signetv1.Update {
			s, b := append([]codec.Section{}, all...), w.binding(t)
			b.ID, _ = identity.ParseID("spiffe://evil.example/data/postgres")
			s[0] = codec.EncodeBinding(b, w.sign)
			return w.update(5, s, s...)
		}, want: codec.ErrForeign},
	} {
		t.Run(name, func(t *testing.T) {
			node := c.node
			if node == "" {
				node = "api-1"
			}
			got, err := codec.Apply(c.held, c.make(), w.trust(node))
			if !errors.Is(err, c.want) || got != nil {
				t.Fatalf("Apply = %v, %v; want %v", got, err, c.want)
			}
		})
	}
}

func TestEveryByteOfASavedSnapshotCounts(t *testing.T) {
	w := newWorld(t)
	saved := w.held(t).Marshal()
	whole, err := codec.Load(saved, w.trust("api-1"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range saved {
		bad := bytes.Clone(saved)
		bad[i] ^= 0x40
		// A flipped byte may only change what no meaning hangs on; then the snapshot must be the same one.
		got, err := codec.Load(bad, w.trust("api-1"))
		if err == nil && !bytes.Equal(got.Marshal(), whole.Marshal()) {
			t.Fatalf("byte %d changed and the snapshot loaded as something else", i)
		}
	}
	for i := range saved {
		if _, err := codec.Load(saved[:i], w.trust("api-1")); err == nil {
			t.Fatalf("a snapshot cut to %d of %d bytes loads", i, len(saved))
		}
	}
}

func TestEqualValuesGiveEqualBytes(t *testing.T) {
	w := newWorld(t)
	a, b := w.sections(t), w.sections(t)
	for i := range a {
		if !bytes.Equal(a[i].Body, b[i].Body) || a[i].Ref != b[i].Ref {
			t.Errorf("section %s differs between two encodings", a[i].Ref.Name)
		}
	}
}

func FuzzLoadSnapshot(f *testing.F) {
	w := newWorld(f)
	saved := w.held(f).Marshal()
	f.Add(saved)
	f.Add(saved[:len(saved)/2])
	f.Add([]byte{})
	trust := w.trust("api-1")
	whole := w.held(f).Marshal()
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := codec.Load(b, trust)
		if err == nil && !bytes.Equal(got.Marshal(), whole) {
			t.Fatal("bytes that no coordinator signed were accepted")
		}
	})
}

// FuzzSections gives every section's parser arbitrary bytes behind a good signature: a lying coordinator must not
// crash an agent, and what parses must be consistent.
func FuzzSections(f *testing.F) {
	w := newWorld(f)
	all := w.sections(f)
	for i, s := range all {
		f.Add(uint8(i), s.Body)
	}
	trust := w.trust("api-1")
	f.Fuzz(func(t *testing.T, which uint8, body []byte) {
		s := append([]codec.Section{}, all...)
		i := int(which) % len(s)
		s[i] = codec.Section{Ref: mesh.SectionRef{Name: s[i].Ref.Name, Hash: sha256.Sum256(body)}, Body: body}
		h, err := codec.Apply(nil, w.update(5, s, s...), trust)
		if err != nil {
			return
		}
		for n := range h.Snapshot.Rulesets {
			if !slices.ContainsFunc(h.Snapshot.Workloads, func(w mesh.Workload) bool { return w.Number == n }) {
				t.Fatalf("ruleset of %v without a workload", n)
			}
			if err := h.Snapshot.Rulesets[n].Validate(); err != nil {
				t.Fatalf("ruleset of %v: %v", n, err)
			}
		}
		if _, err := codec.Load(h.Marshal(), trust); err != nil {
			t.Fatalf("accepted, but does not load again: %v", err)
		}
	})
}
