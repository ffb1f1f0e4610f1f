package enforce

import (
	"maps"
	"net/netip"
	"reflect"
	"unsafe"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// plan is a View in the kernel's terms.
type plan struct {
	addrKeys  []bpf.JudgeAddrKey
	addrs     []bpf.JudgeAddr
	localKeys []bpf.JudgeLocalKey
	locals    []uint32
	ownKeys   []bpf.JudgeOwnKey
	owns      []bpf.JudgeOwn
	ifaceKeys []bpf.JudgeIfaceKey
	ifaces    []uint32

	used     map[uint32]*ruleset // rulesets of this View, by the kernel's number
	missing  []*ruleset          // those that the kernel does not have yet
	rulesets map[identity.Number]uint32
	next     uint32
	seen     map[unsafe.Pointer]struct{} // the Rulesets of this View
}

// plan turns a View into keys and values.
func (w *writer) plan(v *policy.View, generation uint64, base clock) *plan {
	p := &plan{used: map[uint32]*ruleset{}, rulesets: map[identity.Number]uint32{}, next: w.nextRuleset,
		seen: map[unsafe.Pointer]struct{}{}}
	for n, rs := range v.Rulesets {
		if len(rs) > 0 {
			p.rulesets[n] = w.planRuleset(p, rs, base)
		}
	}
	owns := map[identity.Number]*bpf.JudgeOwn{}
	own := func(n identity.Number) *bpf.JudgeOwn {
		if owns[n] == nil {
			owns[n] = &bpf.JudgeOwn{Ruleset: p.rulesets[n], Flags: traitFlags(v.Traits[n])}
		}
		return owns[n]
	}
	for a, info := range v.Addresses {
		k := bpf.JudgeAddrKey{Generation: generation}
		k.Ip.W = words(a)
		val := bpf.JudgeAddr{NotAfter: base.stamp(info.NotAfter), Number: uint32(info.Number)}
		if info.Local {
			val.Flags |= bpf.AddrLocal
			val.Ruleset = p.rulesets[info.Number]
			lend(own(info.Number), a)
		}
		if info.Revoked {
			val.Flags |= bpf.AddrRevoked
		}
		p.addrKeys, p.addrs = append(p.addrKeys, k), append(p.addrs, val)
	}
	for k, n := range v.Locals {
		own(n)
		p.localKeys = append(p.localKeys, bpf.JudgeLocalKey{Generation: generation, Cgroup: k.Cgroup, Uid: k.UID})
		p.locals = append(p.locals, uint32(n))
	}
	for index, n := range v.Interfaces {
		own(n)
		p.ifaceKeys = append(p.ifaceKeys, bpf.JudgeIfaceKey{Generation: generation, Ifindex: index})
		p.ifaces = append(p.ifaces, uint32(n))
	}
	for n, o := range owns {
		p.ownKeys = append(p.ownKeys, bpf.JudgeOwnKey{Generation: generation, Number: uint32(n)})
		p.owns = append(p.owns, *o)
	}
	return p
}

func traitFlags(t policy.Traits) (flags uint32) {
	if t.Confined {
		flags |= bpf.OwnConfined
	}
	if t.OverlayOnly {
		flags |= bpf.OwnOverlayOnly
	}
	return flags
}

// planRuleset gives the kernel's number of a ruleset, an existing one where the content is the same.
func (w *writer) planRuleset(p *plan, rules policy.Ruleset, base clock) uint32 {
	p.seen[identityOf(rules)] = struct{}{}
	rs := w.encoded(rules, base)
	if id, ok := w.byHash[rs.hash]; ok {
		rs.id = id
		w.live[id] = rs // after a start, what it holds is known from now on
		p.used[id] = rs
		return rs.number()
	}
	for _, other := range p.missing {
		if other.hash == rs.hash {
			return other.number()
		}
	}
	rs.id = p.next
	p.next++
	p.missing = append(p.missing, rs)
	p.used[rs.id] = rs
	return rs.number()
}

// encoded gives a ruleset in the kernel's terms. Rulesets are never changed, so what was made of one holds for as long
// as the View has the same one, and the stamps are made by the same clock.
func (w *writer) encoded(rules policy.Ruleset, base clock) *ruleset {
	if rs, ok := w.cache[identityOf(rules)]; ok && rs.base == base {
		return rs
	}
	rs := encodeRuleset(rules, base)
	w.cache[identityOf(rules)] = rs
	return rs
}

// identityOf tells Rulesets apart. It names one for as long as somebody keeps it, as every ruleset does here.
func identityOf(rules policy.Ruleset) unsafe.Pointer {
	return reflect.ValueOf(rules).UnsafePointer()
}

// lend makes a an address that the workload sends from. Of several, the lowest is taken, so that the choice is stable.
func lend(o *bpf.JudgeOwn, a netip.Addr) {
	slot, flag := &o.V6.W, uint32(bpf.OwnV6)
	if a.Is4() {
		slot, flag = &o.V4.W, bpf.OwnV4
	}
	if o.Flags&flag == 0 || a.Less(addrOf(*slot)) {
		*slot = words(a)
	}
	o.Flags |= flag
}

// sameView reports whether two Views mean the same; their generations do not count.
func sameView(a, b *policy.View) bool {
	return a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && a.Revision == b.Revision && sameLease(a.Lease, b.Lease) &&
		maps.Equal(a.Locals, b.Locals) && maps.Equal(a.Traits, b.Traits) && maps.Equal(a.Interfaces, b.Interfaces) &&
		maps.EqualFunc(a.Addresses, b.Addresses, sameAddress) && maps.EqualFunc(a.Rulesets, b.Rulesets, sameRuleset)
}

func sameRuleset(a, b policy.Ruleset) bool {
	return identityOf(a) == identityOf(b) || maps.EqualFunc(a, b, sameValue)
}

func sameLease(a, b policy.Lease) bool { return a.Mode == b.Mode && a.Ends.Equal(b.Ends) }

func sameAddress(a, b policy.Address) bool {
	return a.Number == b.Number && a.Local == b.Local && a.Revoked == b.Revoked && a.NotAfter.Equal(b.NotAfter)
}

func sameValue(a, b policy.Value) bool {
	return sameSlot(a.Allow, b.Allow) && sameSlot(a.Deny, b.Deny) && sameSlot(a.Audit, b.Audit)
}

func sameSlot(a, b policy.Slot) bool {
	return a.Rule == b.Rule && a.Audit == b.Audit && a.NotBefore.Equal(b.NotBefore) && a.NotAfter.Equal(b.NotAfter)
}
