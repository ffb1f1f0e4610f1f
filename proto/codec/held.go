package codec

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// Trust is what an agent checks a snapshot against.
type Trust struct {
	TrustDomain identity.TrustDomain
	Node        string
	// Distribution verifies the certificate of the key that signs manifests and Bindings against the trust bundle.
	Distribution func(der []byte) (ed25519.PublicKey, error)
}

// Held is a verified snapshot together with the bytes that prove it, so that deltas can be applied to it and it can be
// kept on disk. It is immutable.
type Held struct {
	Snapshot mesh.Snapshot
	manifest *signetv1.Signed
	cert     []byte
	bodies   map[string][]byte
}

// Sections lists what is held, for Hello.
func (h *Held) Sections() []mesh.SectionRef {
	if h == nil {
		return nil
	}
	return h.Snapshot.Manifest.Sections
}

// Epoch is that of the snapshot; 0 for none.
func (h *Held) Epoch() uint64 {
	if h == nil {
		return 0
	}
	return h.Snapshot.Manifest.Epoch
}

// Apply verifies an Update against trust, puts it on top of held (nil for none), and returns the result. held stays as
// it was; on any error nothing of the Update counts.
func Apply(held *Held, u *signetv1.Update, trust Trust) (*Held, error) {
	pub, err := trust.Distribution(u.GetDistributionCertificate())
	if err != nil {
		return nil, fmt.Errorf("distribution certificate: %w", err)
	}
	m, err := decodeManifest(u.GetManifest(), pub, trust.TrustDomain, trust.Node)
	if err != nil {
		return nil, err
	}
	if m.Epoch < held.Epoch() || m.Epoch == held.Epoch() && !bytes.Equal(u.Manifest.Payload, held.manifest.Payload) {
		return nil, fmt.Errorf("epoch %d after %d: %w", m.Epoch, held.Epoch(), ErrRollback)
	}
	next := &Held{manifest: u.Manifest, cert: u.DistributionCertificate}
	if next.bodies, err = collect(held, u.Sections, m); err != nil {
		return nil, err
	}
	if next.Snapshot, err = assemble(m, next.bodies, held, pub, trust); err != nil {
		return nil, err
	}
	return next, nil
}

// Claimed reads what an Update says of itself, unverified: good for nothing but to name it in a refusal.
func Claimed(u *signetv1.Update) mesh.Manifest {
	var m signetv1.Manifest
	if err := unmarshal("manifest", u.GetManifest().GetPayload(), &m); err != nil {
		return mesh.Manifest{}
	}
	return mesh.Manifest{Epoch: m.Epoch, PolicyRevision: m.PolicyRevision}
}

// collect finds a body for each section that the manifest names, and checks its hash.
func collect(held *Held, sent []*signetv1.Section, m mesh.Manifest) (map[string][]byte, error) {
	if len(sent) > maxSections {
		return nil, malformed("update with %d sections", len(sent))
	}
	fresh := make(map[string][]byte, len(sent))
	for _, s := range sent {
		if _, twice := fresh[s.Name]; twice || len(s.Body) > maxSectionBytes {
			return nil, malformed("update has section %.128q twice or too large", s.Name)
		}
		fresh[s.Name] = s.Body
	}
	out := make(map[string][]byte, len(m.Sections))
	for _, ref := range m.Sections {
		body, ok := fresh[ref.Name]
		if !ok && held != nil {
			body, ok = held.bodies[ref.Name]
		}
		if !ok {
			return nil, fmt.Errorf("section %q is missing: %w", ref.Name, ErrHash)
		}
		if sha256.Sum256(body) != ref.Hash {
			return nil, fmt.Errorf("section %q: %w", ref.Name, ErrHash)
		}
		out[ref.Name] = body
	}
	return out, nil
}

// assembler parses sections into one snapshot.
type assembler struct {
	snap mesh.Snapshot
	// before holds the rulesets that were parsed from the same bytes already, by the name of their section.
	before map[string]owned
	pub    ed25519.PublicKey
	trust  Trust
}

func assemble(m mesh.Manifest, bodies map[string][]byte, held *Held, pub ed25519.PublicKey, trust Trust) (mesh.Snapshot, error) {
	a := assembler{pub: pub, trust: trust, before: unchanged(held, m), snap: mesh.Snapshot{Manifest: m,
		Rulesets: map[identity.Number]policy.Ruleset{}, Rules: map[uint32]string{},
		Names: map[identity.Number]identity.ID{}, Revoked: map[netip.Addr]identity.Number{}}}
	for _, ref := range m.Sections {
		if err := a.section(ref.Name, bodies[ref.Name]); err != nil {
			return mesh.Snapshot{}, fmt.Errorf("section %q: %w", ref.Name, err)
		}
	}
	if a.snap.Self.Node == "" {
		return mesh.Snapshot{}, malformed("snapshot without a section %q", sectionSelf)
	}
	if err := a.consistent(); err != nil {
		return mesh.Snapshot{}, err
	}
	slices.SortFunc(a.snap.Bindings, func(x, y mesh.Binding) int {
		return cmp.Or(cmp.Compare(x.Number, y.Number), cmp.Compare(x.Node, y.Node))
	})
	return a.snap, nil
}

// owned is a ruleset with the workload that it belongs to.
type owned struct {
	number identity.Number
	rules  policy.Ruleset
}

// unchanged finds the rulesets of held whose sections m names with the same hash. A snapshot shares them with the one
// before it, so that whoever made something of one need not do it again.
func unchanged(held *Held, m mesh.Manifest) map[string]owned {
	if held == nil {
		return nil
	}
	is := make(map[string]mesh.Hash, len(m.Sections))
	for _, ref := range m.Sections {
		is[ref.Name] = ref.Hash
	}
	out := make(map[string]owned, len(held.Snapshot.Rulesets))
	for _, ref := range held.Sections() {
		if hash, ok := is[ref.Name]; !ok || hash != ref.Hash {
			delete(is, ref.Name)
		}
	}
	for n, rs := range held.Snapshot.Rulesets {
		if name := RulesetSection(n); is[name] != (mesh.Hash{}) {
			out[name] = owned{n, rs}
		}
	}
	return out
}

func (a *assembler) section(name string, body []byte) (err error) {
	td := a.trust.TrustDomain
	switch {
	case name == sectionSelf:
		a.snap.Self, err = decodeSelf(body, td, a.trust.Node)
	case name == sectionWorkloads:
		a.snap.Workloads, err = decodeWorkloads(body, td)
	case name == sectionNames:
		a.snap.Names, a.snap.Rules, err = decodeNames(body, td)
	case name == sectionRevoked:
		a.snap.Revoked, err = decodeRevoked(body)
	case strings.HasPrefix(name, prefixBinding):
		var b mesh.Binding
		if b, err = DecodeBinding(body, a.pub, td); err == nil && BindingSection(b.Number, b.Node) != name {
			err = malformed("holds the binding of %v on %s", b.ID, b.Node)
		}
		a.snap.Bindings = append(a.snap.Bindings, b)
	case strings.HasPrefix(name, prefixRuleset):
		err = a.ruleset(name, body)
	default:
		// A newer coordinator may add sections; what this agent does not know it cannot make real, so it refuses
		// instead of enforcing half of what was meant.
		err = malformed("unknown to this version")
	}
	return err
}

func (a *assembler) ruleset(name string, body []byte) error {
	if o, ok := a.before[name]; ok {
		a.snap.Rulesets[o.number] = o.rules
		return nil
	}
	n, rs, err := decodeRuleset(body)
	if err == nil && RulesetSection(n) != name {
		err = malformed("holds the ruleset of %v", n)
	}
	a.snap.Rulesets[n] = rs
	return err
}

// consistent checks what no single section shows: every address lies in the overlay and has one owner here, and a
// ruleset belongs to an own workload.
func (a *assembler) consistent() error {
	s := &a.snap
	in := func(addrs []netip.Addr) bool {
		return s.Self.Overlay4.Contains(addrs[0]) && s.Self.Overlay6.Contains(addrs[1])
	}
	owner := map[netip.Addr]identity.ID{}
	claim := func(id identity.ID, addrs []netip.Addr) error {
		if !in(addrs) {
			return malformed("addresses %v of %v are outside the overlay", addrs, id)
		}
		for _, addr := range addrs {
			if prev, twice := owner[addr]; twice {
				return malformed("address %v belongs to %v and to %v", addr, prev, id)
			}
			owner[addr] = id
		}
		return nil
	}
	if err := claim(s.Self.ID, s.Self.Addresses); err != nil {
		return err
	}
	own := map[identity.Number]bool{}
	for _, w := range s.Workloads {
		own[w.Number] = true
		if err := claim(w.ID, w.Addresses); err != nil {
			return err
		}
	}
	for _, b := range s.Bindings {
		if err := claim(b.ID, b.Addresses); err != nil {
			return err
		}
	}
	for n := range s.Rulesets {
		if !own[n] {
			return malformed("ruleset of %v, which is not a workload here", n)
		}
	}
	return nil
}

// Marshal gives the form that is kept on disk: a whole Update.
func (h *Held) Marshal() []byte {
	u := &signetv1.Update{Manifest: h.manifest, DistributionCertificate: h.cert}
	for _, ref := range h.Sections() {
		u.Sections = append(u.Sections, &signetv1.Section{Name: ref.Name, Body: h.bodies[ref.Name]})
	}
	return marshal(u)
}

// Load reads what Marshal wrote and verifies it like anything that comes from outside.
func Load(b []byte, trust Trust) (*Held, error) {
	var u signetv1.Update
	if err := unmarshal("saved snapshot", b, &u); err != nil {
		return nil, err
	}
	return Apply(nil, &u, trust)
}
