package codec

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// Context strings keep a signature made for one purpose from counting for another.
const (
	manifestContext = "signet manifest v1\x00"
	bindingContext  = "signet binding v1\x00"
)

// Names of sections. Bindings and rulesets have one section each, so that a change travels alone.
const (
	sectionSelf      = "self"
	sectionWorkloads = "workloads"
	sectionNames     = "names"
	sectionRevoked   = "revoked"
	prefixBinding    = "binding/"
	prefixRuleset    = "ruleset/"
)

// Sign makes an Ed25519 signature over message with the distribution key.
type Sign func(message []byte) []byte

// Section is one encoded part of a snapshot with its hash. Its bytes may be shared and must not be changed.
type Section struct {
	Ref  mesh.SectionRef
	Body []byte
}

func section(name string, m proto.Message) Section {
	return sectionOf(name, marshal(m))
}

func sectionOf(name string, body []byte) Section {
	return Section{mesh.SectionRef{Name: name, Hash: sha256.Sum256(body)}, body}
}

// marshal panics on failure: the messages are built here from valid values, so failing is a bug.
func marshal(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic("internal error: marshal: " + err.Error())
	}
	return b
}

func sign(context string, payload []byte, s Sign) *signetv1.Signed {
	return &signetv1.Signed{Payload: payload, Signature: s(append([]byte(context), payload...))}
}

// EncodeManifest signs a manifest for an agent of trust domain td.
func EncodeManifest(m mesh.Manifest, td identity.TrustDomain, s Sign) *signetv1.Signed {
	refs := make([]*signetv1.SectionRef, len(m.Sections))
	for i, r := range m.Sections {
		refs[i] = &signetv1.SectionRef{Name: r.Name, Hash: r.Hash[:]}
	}
	return sign(manifestContext, marshal(&signetv1.Manifest{
		Node: m.Node, Epoch: m.Epoch, PolicyRevision: m.PolicyRevision, TrustDomain: td.String(),
		IssuedAtUnix: m.IssuedAt.Unix(), LeaseEndsUnix: m.LeaseEnds.Unix(), Sections: refs,
	}), s)
}

// EncodeBinding signs a Binding as a section of its own. Equal Bindings give equal bytes, so one encoding serves every
// agent that sees it.
func EncodeBinding(b mesh.Binding, s Sign) Section {
	payload := marshal(&signetv1.Binding{
		Id: b.ID.String(), Number: uint32(b.Number), Node: b.Node, WireguardKey: b.Key.Bytes(),
		Addresses: encodeAddrs(b.Addresses), NotBeforeUnix: b.NotBefore.Unix(), NotAfterUnix: b.NotAfter.Unix(), Revision: b.Revision,
	})
	return section(BindingSection(b.Number, b.Node), sign(bindingContext, payload, s))
}

// BindingSection is the name of the section that holds the Binding of a Number on a node.
func BindingSection(n identity.Number, node string) string {
	return fmt.Sprintf("%s%d/%s", prefixBinding, n, node)
}

// EncodeSelf encodes what the host itself is.
func EncodeSelf(s mesh.Self) Section {
	return section(sectionSelf, &signetv1.Self{
		Id: s.ID.String(), Number: uint32(s.Number), Node: s.Node, Addresses: encodeAddrs(s.Addresses),
		Overlay4: s.Overlay4.String(), Overlay6: s.Overlay6.String(), Status: s.Status,
	})
}

// EncodeWorkloads encodes the host's own workloads.
func EncodeWorkloads(ws []mesh.Workload) Section {
	out := &signetv1.Workloads{}
	for _, w := range slices.SortedFunc(slices.Values(ws), func(a, b mesh.Workload) int { return cmp.Compare(a.Number, b.Number) }) {
		m := &signetv1.Workload{Id: w.ID.String(), Number: uint32(w.Number), Addresses: encodeAddrs(w.Addresses),
			Confined: w.Traits.Confined, OverlayOnly: w.Traits.OverlayOnly}
		for _, sel := range w.Selectors {
			m.Selectors = append(m.Selectors, sel.String())
		}
		out.Workloads = append(out.Workloads, m)
	}
	return section(sectionWorkloads, out)
}

// EncodeRuleset encodes the ruleset of one own workload.
func EncodeRuleset(n identity.Number, rs policy.Ruleset) Section {
	keys := slices.SortedFunc(maps.Keys(rs), compareKeys)
	out := &signetv1.Ruleset{Number: uint32(n), Entries: make([]*signetv1.Entry, 0, len(keys))}
	for _, k := range keys {
		v := rs[k]
		out.Entries = append(out.Entries, &signetv1.Entry{
			Peer: uint32(k.Peer), Proto: uint32(k.Proto), Port: wirePort(k), PortBits: uint32(k.Bits), Ingress: k.Dir == policy.Ingress,
			Allow: encodeSlot(v.Allow), Deny: encodeSlot(v.Deny), Audit: encodeSlot(v.Audit),
		})
	}
	return section(RulesetSection(n), out)
}

// rangeMark is added to the port of a range. An agent that does not know port_bits would take the range for one port, and
// one that begins at 0 for every port; this it refuses.
const rangeMark = 1 << 16

func wirePort(k policy.Key) uint32 {
	if k.Bits > 0 {
		return rangeMark | uint32(k.Port)
	}
	return uint32(k.Port)
}

// RulesetSection is the name of the section that holds the ruleset of a Number.
func RulesetSection(n identity.Number) string { return prefixRuleset + n.String() }

func compareKeys(a, b policy.Key) int {
	return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port),
		cmp.Compare(a.Bits, b.Bits))
}

// EncodeNames encodes what the numbers in rulesets and records stand for.
func EncodeNames(ids map[identity.Number]identity.ID, rules map[uint32]string) Section {
	out := &signetv1.Names{Identities: make(map[uint32]string, len(ids)), Rules: rules}
	for n, id := range ids {
		out.Identities[uint32(n)] = id.String()
	}
	return section(sectionNames, out)
}

// EncodeRevoked encodes tombstones of addresses.
func EncodeRevoked(addrs map[netip.Addr]identity.Number) Section {
	out := &signetv1.Revoked{}
	for _, a := range slices.SortedFunc(maps.Keys(addrs), netip.Addr.Compare) {
		out.Addresses = append(out.Addresses, &signetv1.RevokedAddress{Address: a.AsSlice(), Number: uint32(addrs[a])})
	}
	return section(sectionRevoked, out)
}

func encodeAddrs(as []netip.Addr) [][]byte {
	out := make([][]byte, len(as))
	for i, a := range as {
		out[i] = a.AsSlice()
	}
	return out
}

func encodeSlot(s policy.Slot) *signetv1.Slot {
	if !s.Present() {
		return nil
	}
	return &signetv1.Slot{Rule: s.Rule, NotBeforeUnix: unix(s.NotBefore), NotAfterUnix: unix(s.NotAfter), Audit: s.Audit}
}

// unix keeps the zero time as 0; no rule begins or ends in 1970.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
