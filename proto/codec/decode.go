package codec

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// What a decoder refuses with. Tests and callers match on these.
var (
	ErrSignature = errors.New("signature does not verify")
	ErrMalformed = errors.New("malformed")
	ErrForeign   = errors.New("made for another node or trust domain")
	ErrRollback  = errors.New("older than what is held")
	ErrHash      = errors.New("content does not match its signed hash")
)

// Limits before allocation; a coordinator stays far below them.
const (
	maxSections     = 1 << 18
	maxSectionBytes = 64 << 20
	maxWorkloads    = policy.MaxRulesets
	// MaxLease bounds what an agent believes, whatever is signed: 7 days, the longest that faults.md promises.
	MaxLease = 7 * 24 * time.Hour
)

func malformed(what string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(what, args...))
}

func unmarshal(what string, b []byte, m proto.Message) error {
	if err := proto.Unmarshal(b, m); err != nil {
		return malformed("%s is not a message", what)
	}
	return nil
}

// open verifies first and hands out only the bytes that were verified.
func open(context string, s *signetv1.Signed, pub ed25519.PublicKey) ([]byte, error) {
	if s == nil || len(s.Signature) != ed25519.SignatureSize || len(pub) != ed25519.PublicKeySize {
		return nil, ErrSignature
	}
	if !ed25519.Verify(pub, append([]byte(context), s.Payload...), s.Signature) {
		return nil, ErrSignature
	}
	return s.Payload, nil
}

// decodeManifest verifies and parses a manifest made for node in td.
func decodeManifest(s *signetv1.Signed, pub ed25519.PublicKey, td identity.TrustDomain, node string) (mesh.Manifest, error) {
	payload, err := open(manifestContext, s, pub)
	if err != nil {
		return mesh.Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	var m signetv1.Manifest
	if err := unmarshal("manifest", payload, &m); err != nil {
		return mesh.Manifest{}, err
	}
	if m.Node != node || m.TrustDomain != td.String() {
		return mesh.Manifest{}, fmt.Errorf("manifest for node %q in %q: %w", m.Node, m.TrustDomain, ErrForeign)
	}
	out := mesh.Manifest{Node: m.Node, Epoch: m.Epoch, PolicyRevision: m.PolicyRevision,
		IssuedAt: time.Unix(m.IssuedAtUnix, 0).UTC(), LeaseEnds: time.Unix(m.LeaseEndsUnix, 0).UTC()}
	if life := out.LeaseEnds.Sub(out.IssuedAt); life <= 0 || life > MaxLease {
		return mesh.Manifest{}, malformed("manifest has a lease of %v, expected up to %v", life, MaxLease)
	}
	if m.Epoch == 0 || len(m.Sections) > maxSections {
		return mesh.Manifest{}, malformed("manifest of epoch %d has %d sections", m.Epoch, len(m.Sections))
	}
	for i, r := range m.Sections {
		ref, err := decodeRef(r)
		if err != nil {
			return mesh.Manifest{}, err
		}
		if i > 0 && ref.Name <= out.Sections[i-1].Name {
			return mesh.Manifest{}, malformed("manifest sections are not in order at %q", ref.Name)
		}
		out.Sections = append(out.Sections, ref)
	}
	return out, nil
}

func decodeRef(r *signetv1.SectionRef) (mesh.SectionRef, error) {
	ref := mesh.SectionRef{Name: r.GetName()}
	if len(r.GetHash()) != len(ref.Hash) || ref.Name == "" || len(ref.Name) > 128 {
		return ref, malformed("section reference %.128q", ref.Name)
	}
	copy(ref.Hash[:], r.Hash)
	return ref, nil
}

// DecodeRefs reads what an agent says that it holds.
func DecodeRefs(refs []*signetv1.SectionRef) ([]mesh.SectionRef, error) {
	if len(refs) > maxSections {
		return nil, malformed("%d sections", len(refs))
	}
	out := make([]mesh.SectionRef, len(refs))
	for i, r := range refs {
		var err error
		if out[i], err = decodeRef(r); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// EncodeRefs is the reverse of DecodeRefs.
func EncodeRefs(refs []mesh.SectionRef) []*signetv1.SectionRef {
	out := make([]*signetv1.SectionRef, len(refs))
	for i, r := range refs {
		out[i] = &signetv1.SectionRef{Name: r.Name, Hash: r.Hash[:]}
	}
	return out
}

// DecodeBinding verifies and parses the body of a binding section.
func DecodeBinding(body []byte, pub ed25519.PublicKey, td identity.TrustDomain) (mesh.Binding, error) {
	var s signetv1.Signed
	if err := unmarshal("binding", body, &s); err != nil {
		return mesh.Binding{}, err
	}
	payload, err := open(bindingContext, &s, pub)
	if err != nil {
		return mesh.Binding{}, fmt.Errorf("binding: %w", err)
	}
	var m signetv1.Binding
	if err := unmarshal("binding", payload, &m); err != nil {
		return mesh.Binding{}, err
	}
	return bindingOf(&m, td)
}

func bindingOf(m *signetv1.Binding, td identity.TrustDomain) (mesh.Binding, error) {
	id, err := parseID(m.Id, td)
	if err != nil {
		return mesh.Binding{}, err
	}
	if err := identity.ParseName(m.Node); err != nil {
		return mesh.Binding{}, malformed("binding of %v: node %.70q", id, m.Node)
	}
	pub, err := key.PublicFromBytes(m.WireguardKey)
	if err != nil {
		return mesh.Binding{}, malformed("binding of %v: %v", id, err)
	}
	addrs, err := decodeAddrs(m.Addresses)
	if err != nil {
		return mesh.Binding{}, fmt.Errorf("binding of %v: %w", id, err)
	}
	n, err := number(m.Number)
	if err != nil {
		return mesh.Binding{}, fmt.Errorf("binding of %v: %w", id, err)
	}
	b := mesh.Binding{ID: id, Number: n, Node: m.Node, Key: pub, Addresses: addrs, Revision: m.Revision,
		NotBefore: time.Unix(m.NotBeforeUnix, 0).UTC(), NotAfter: time.Unix(m.NotAfterUnix, 0).UTC()}
	if life := b.NotAfter.Sub(b.NotBefore); life <= 0 || life > MaxLease {
		return mesh.Binding{}, malformed("binding of %v lives %v, expected up to %v", id, life, MaxLease)
	}
	if node := id.NodeName(); node != "" && node != b.Node {
		return mesh.Binding{}, malformed("binding of %v stands under node %q", id, b.Node)
	}
	return b, nil
}

func parseID(s string, td identity.TrustDomain) (identity.ID, error) {
	id, err := identity.ParseID(s)
	if err != nil {
		return id, malformed("%v", err)
	}
	if id.TrustDomain() != td {
		return id, fmt.Errorf("%v: %w", id, ErrForeign)
	}
	return id, nil
}

func number(n uint32) (identity.Number, error) {
	if num := identity.Number(n); num.Allocated() {
		return num, nil
	}
	return 0, malformed("number %d is reserved", n)
}

// decodeAddrs reads one IPv4 and one IPv6 address, in this order.
func decodeAddrs(in [][]byte) ([]netip.Addr, error) {
	if len(in) != 2 {
		return nil, malformed("%d addresses, expected one IPv4 and one IPv6", len(in))
	}
	a4, ok4 := netip.AddrFromSlice(in[0])
	a6, ok6 := netip.AddrFromSlice(in[1])
	if !ok4 || !ok6 || !a4.Is4() || !a6.Is6() || a6.Is4In6() || !unicast(a4) || !unicast(a6) {
		return nil, malformed("addresses %v and %v are not one IPv4 and one IPv6", a4, a6)
	}
	return []netip.Addr{a4, a6}, nil
}

func unicast(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
}

func decodeSelf(body []byte, td identity.TrustDomain, node string) (mesh.Self, error) {
	var m signetv1.Self
	if err := unmarshal("self", body, &m); err != nil {
		return mesh.Self{}, err
	}
	id, err := parseID(m.Id, td)
	if err != nil {
		return mesh.Self{}, err
	}
	if m.Node != node || id.NodeName() != node {
		return mesh.Self{}, fmt.Errorf("self says node %q: %w", m.Node, ErrForeign)
	}
	n, err := number(m.Number)
	if err != nil {
		return mesh.Self{}, err
	}
	addrs, err := decodeAddrs(m.Addresses)
	if err != nil {
		return mesh.Self{}, err
	}
	o4, err4 := netip.ParsePrefix(m.Overlay4)
	o6, err6 := netip.ParsePrefix(m.Overlay6)
	if err4 != nil || err6 != nil || !o4.Addr().Is4() || !o6.Addr().Is6() || o4.Bits() < 8 || o6.Bits() < 32 {
		return mesh.Self{}, malformed("overlay ranges %q and %q", m.Overlay4, m.Overlay6)
	}
	switch m.Status {
	case "active", "pending", "revoked":
	default: // an agent that does not know the word must not take it for active
		return mesh.Self{}, malformed("self has status %.32q, expected active, pending or revoked", m.Status)
	}
	return mesh.Self{ID: id, Number: n, Node: m.Node, Addresses: addrs, Overlay4: o4.Masked(), Overlay6: o6.Masked(), Status: m.Status}, nil
}

func decodeWorkloads(body []byte, td identity.TrustDomain) ([]mesh.Workload, error) {
	var m signetv1.Workloads
	if err := unmarshal("workloads", body, &m); err != nil {
		return nil, err
	}
	if len(m.Workloads) > maxWorkloads {
		return nil, malformed("%d workloads, at most %d", len(m.Workloads), maxWorkloads)
	}
	out := make([]mesh.Workload, 0, len(m.Workloads))
	for _, w := range m.Workloads {
		id, err := parseID(w.Id, td)
		if err != nil {
			return nil, err
		}
		n, err := number(w.Number)
		if err != nil {
			return nil, fmt.Errorf("workload %v: %w", id, err)
		}
		addrs, err := decodeAddrs(w.Addresses)
		if err != nil {
			return nil, fmt.Errorf("workload %v: %w", id, err)
		}
		wl := mesh.Workload{ID: id, Number: n, Addresses: addrs, Traits: policy.Traits{Confined: w.Confined, OverlayOnly: w.OverlayOnly}}
		for _, s := range w.Selectors {
			sel, err := policy.ParseSelector(s)
			if err != nil {
				return nil, malformed("workload %v: %v", id, err)
			}
			wl.Selectors = append(wl.Selectors, sel)
		}
		if err := policy.CheckSelectors(wl.Selectors); err != nil {
			return nil, malformed("workload %v: %v", id, err)
		}
		out = append(out, wl)
	}
	return out, nil
}

func fromUnix(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(n, 0).UTC()
}

func decodeNames(body []byte, td identity.TrustDomain) (map[identity.Number]identity.ID, map[uint32]string, error) {
	var m signetv1.Names
	if err := unmarshal("names", body, &m); err != nil {
		return nil, nil, err
	}
	ids := make(map[identity.Number]identity.ID, len(m.Identities))
	for n, s := range m.Identities {
		id, err := parseID(s, td)
		if err != nil {
			return nil, nil, err
		}
		ids[identity.Number(n)] = id
	}
	for n, s := range m.Rules {
		if err := identity.ParseName(s); err != nil {
			return nil, nil, malformed("rule %d: %v", n, err)
		}
	}
	return ids, m.Rules, nil
}

func decodeRevoked(body []byte) (map[netip.Addr]identity.Number, error) {
	var m signetv1.Revoked
	if err := unmarshal("revoked", body, &m); err != nil {
		return nil, err
	}
	out := make(map[netip.Addr]identity.Number, len(m.Addresses))
	for _, r := range m.Addresses {
		a, ok := netip.AddrFromSlice(r.Address)
		if !ok || !unicast(a) {
			return nil, malformed("revoked address of %d bytes", len(r.Address))
		}
		out[a] = identity.Number(r.Number)
	}
	return out, nil
}

// ParseEndpoints reads "ip:port" texts; what is not one is left out, because endpoints are only hints. At most limit
// are kept.
func ParseEndpoints(in []string, limit int) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range in {
		if len(out) == limit {
			break
		}
		ap, err := netip.ParseAddrPort(s)
		if err != nil || ap.Port() == 0 || !ap.Addr().IsGlobalUnicast() && !ap.Addr().IsLoopback() || slices.Contains(out, ap) {
			continue
		}
		out = append(out, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
	}
	return out
}
