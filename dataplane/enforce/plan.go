package enforce

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"

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

	used     map[uint32]bool  // rulesets of this View
	missing  map[uint32]fresh // those that the kernel does not have yet
	rulesets map[identity.Number]uint32
	next     uint32
}

// fresh is a ruleset to be written.
type fresh struct {
	hash    [32]byte
	keys    []bpf.JudgeEntryKey
	entries []bpf.JudgeEntry
}

// plan turns a View into keys and values.
func (w *writer) plan(v *policy.View, generation uint64, base clock) *plan {
	p := &plan{used: map[uint32]bool{}, missing: map[uint32]fresh{}, rulesets: map[identity.Number]uint32{}, next: w.nextRuleset}
	for n, rs := range v.Rulesets {
		p.rulesets[n] = w.planRuleset(p, rs, base)
	}
	owns := map[identity.Number]*bpf.JudgeOwn{}
	own := func(n identity.Number) *bpf.JudgeOwn {
		if owns[n] == nil {
			owns[n] = &bpf.JudgeOwn{Ruleset: p.rulesets[n]}
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
	for n, o := range owns {
		p.ownKeys = append(p.ownKeys, bpf.JudgeOwnKey{Generation: generation, Number: uint32(n)})
		p.owns = append(p.owns, *o)
	}
	return p
}

// planRuleset gives the kernel's number of a ruleset, an existing one where the content is the same.
func (w *writer) planRuleset(p *plan, rs policy.Ruleset, base clock) uint32 {
	if len(rs) == 0 {
		return 0
	}
	f := encodeRuleset(rs, base)
	if id, ok := w.rulesets[f.hash]; ok {
		p.used[id] = true
		return id
	}
	for id, other := range p.missing {
		if other.hash == f.hash {
			return id
		}
	}
	id := p.next
	p.next++
	for i := range f.keys {
		f.keys[i].Ruleset = id
	}
	p.missing[id], p.used[id] = f, true
	return id
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

// encodeRuleset gives the entries in the kernel's terms, with ruleset 0, and their hash.
func encodeRuleset(rs policy.Ruleset, base clock) fresh {
	keys := slices.SortedFunc(maps.Keys(rs), func(a, b policy.Key) int {
		return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port))
	})
	f := fresh{keys: make([]bpf.JudgeEntryKey, 0, len(keys)), entries: make([]bpf.JudgeEntry, 0, len(keys))}
	h := sha256.New()
	var buf []byte
	for _, k := range keys {
		key := bpf.JudgeEntryKey{Peer: uint32(k.Peer), Port: k.Port, Proto: uint8(k.Proto), Dir: uint8(k.Dir)}
		e := encodeValue(rs[k], base)
		f.keys, f.entries = append(f.keys, key), append(f.entries, e)
		buf = binary.LittleEndian.AppendUint32(buf[:0], key.Peer)
		buf = binary.LittleEndian.AppendUint16(buf, key.Port)
		buf = append(buf, key.Proto, key.Dir)
		buf = binary.LittleEndian.AppendUint32(buf, e.Allow.Rule)
		buf = binary.LittleEndian.AppendUint32(buf, e.Deny.Rule)
		for _, stamp := range [...]uint64{e.Allow.NotBefore, e.Allow.NotAfter, e.Deny.NotBefore, e.Deny.NotAfter} {
			buf = binary.LittleEndian.AppendUint64(buf, stamp)
		}
		h.Write(buf)
	}
	h.Sum(f.hash[:0])
	return f
}

func encodeValue(v policy.Value, base clock) (e bpf.JudgeEntry) {
	e.Allow.Rule, e.Allow.NotBefore, e.Allow.NotAfter = v.Allow.Rule, base.stamp(v.Allow.NotBefore), base.stamp(v.Allow.NotAfter)
	e.Deny.Rule, e.Deny.NotBefore, e.Deny.NotAfter = v.Deny.Rule, base.stamp(v.Deny.NotBefore), base.stamp(v.Deny.NotAfter)
	return e
}

// sameView reports whether two Views mean the same; their generations do not count.
func sameView(a, b *policy.View) bool {
	return a.Overlay4 == b.Overlay4 && a.Overlay6 == b.Overlay6 && a.Revision == b.Revision && sameLease(a.Lease, b.Lease) &&
		maps.Equal(a.Locals, b.Locals) &&
		maps.EqualFunc(a.Addresses, b.Addresses, sameAddress) &&
		maps.EqualFunc(a.Rulesets, b.Rulesets, func(x, y policy.Ruleset) bool { return maps.EqualFunc(x, y, sameValue) })
}

func sameLease(a, b policy.Lease) bool { return a.Mode == b.Mode && a.Ends.Equal(b.Ends) }

func sameAddress(a, b policy.Address) bool {
	return a.Number == b.Number && a.Local == b.Local && a.Revoked == b.Revoked && a.NotAfter.Equal(b.NotAfter)
}

func sameValue(a, b policy.Value) bool { return sameSlot(a.Allow, b.Allow) && sameSlot(a.Deny, b.Deny) }

func sameSlot(a, b policy.Slot) bool {
	return a.Rule == b.Rule && a.NotBefore.Equal(b.NotBefore) && a.NotAfter.Equal(b.NotAfter)
}
