package enforce

import (
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
)

// The maps of bpf/lib, by name.
const (
	mapConfig   = "config"
	mapViews    = "views"
	mapAddrs    = "addrs"
	mapLocals   = "locals"
	mapOwns     = "owns"
	mapRulesets = "rulesets"
	mapEntries  = "entries"
	mapRanges   = "ranges"
	mapWindows  = "windows"
	mapIfaces   = "ifaces"
	mapConns4   = "conns4"
	mapConns6   = "conns6"
	mapUsage    = "usage"
	mapCounters = "counters"
	mapEvents   = "events"
	mapLost     = "lost"
)

// batch is how many keys one system call carries. It is larger than any hash bucket gets, which a batched read needs.
const batch = 4096

// words is an address as the kernel has it: network order, IPv4 mapped.
func words(a netip.Addr) (w [4]uint32) {
	b := a.As16()
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&w)), 16), b[:])
	return w
}

// addrOf is the reverse of words.
func addrOf(w [4]uint32) netip.Addr {
	var b [16]byte
	copy(b[:], unsafe.Slice((*byte)(unsafe.Pointer(&w)), 16))
	return netip.AddrFrom16(b).Unmap()
}

// tupleKey writes a tuple as the kernel has it.
func tupleKey(t flow.Tuple) (k bpf.JudgeTuple) {
	k.Src.W, k.Dst.W = words(t.Src.Addr()), words(t.Dst.Addr())
	k.Sport, k.Dport, k.Proto = t.Src.Port(), t.Dst.Port(), uint8(t.Proto)
	return k
}

// tupleOf is the reverse of tupleKey.
func tupleOf(k bpf.JudgeTuple) flow.Tuple {
	return flow.Tuple{
		Src:   netip.AddrPortFrom(addrOf(k.Src.W), k.Sport),
		Dst:   netip.AddrPortFrom(addrOf(k.Dst.W), k.Dport),
		Proto: flow.Proto(k.Proto),
	}
}

// tuple4Of makes the key of an IPv4 conversation one like the others.
func tuple4Of(k bpf.JudgeTuple4) bpf.JudgeTuple {
	mapped := func(w uint32) [4]uint32 { return [4]uint32{2: mappedWord, 3: w} }
	t := bpf.JudgeTuple{Sport: k.Sport, Dport: k.Dport, Proto: k.Proto}
	t.Src.W, t.Dst.W = mapped(k.Src), mapped(k.Dst)
	return t
}

// mappedWord is the third word of a mapped address, in the kernel's order.
var mappedWord = words(netip.AddrFrom4([4]byte{}))[2]

// eachConn calls f for every tracked connection of both families.
func eachConn(m map[string]*ebpf.Map, f func(bpf.JudgeTuple, *bpf.JudgeConn) bool) error {
	more := true
	err := each(m[mapConns4], func(k *bpf.JudgeTuple4, c *bpf.JudgeConn) bool {
		more = f(tuple4Of(*k), c)
		return more
	})
	if err != nil || !more {
		return err
	}
	return each(m[mapConns6], func(k *bpf.JudgeTuple, c *bpf.JudgeConn) bool { return f(*k, c) })
}

// putConn writes one tracked connection, under its canonical key.
func putConn(m map[string]*ebpf.Map, k bpf.JudgeTuple, c bpf.JudgeConn) error {
	if k.Src.W[2] == mappedWord && k.Src.W[0] == 0 && k.Src.W[1] == 0 {
		k4 := bpf.JudgeTuple4{Src: k.Src.W[3], Dst: k.Dst.W[3], Sport: k.Sport, Dport: k.Dport, Proto: k.Proto}
		return m[mapConns4].Put(k4, c) //nolint:wrapcheck // the caller says which
	}
	return m[mapConns6].Put(k, c) //nolint:wrapcheck // the caller says which
}

// each calls f for every entry of a hash map, in batches. Entries that come or go meanwhile may be missed.
func each[K, V any](m *ebpf.Map, f func(*K, *V) bool) error {
	size := min(batch, int(m.MaxEntries()))
	keys, values := make([]K, size), make([]V, size)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read map %s: %w", m, err)
		}
		for i := range n {
			if !f(&keys[i], &values[i]) {
				return nil
			}
		}
		if err != nil {
			return nil
		}
	}
}

// put writes all entries.
func put[K, V any](m *ebpf.Map, keys []K, values []V) error {
	for len(keys) > 0 {
		n := min(batch, len(keys))
		if done, err := m.BatchUpdate(keys[:n], values[:n], nil); err != nil {
			return fmt.Errorf("write map %s, entry %d of %d: %w", m, done, n, err)
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}

// purge deletes every entry that stale names, and returns how many are left and how many went.
func purge[K, V any](m *ebpf.Map, stale func(*K, *V) bool) (left, gone int, err error) {
	var keys []K
	err = each(m, func(k *K, v *V) bool {
		if stale(k, v) {
			keys = append(keys, *k)
		} else {
			left++
		}
		return true
	})
	if err != nil {
		return left, 0, err
	}
	gone = len(keys)
	for len(keys) > 0 {
		n := min(batch, len(keys))
		if _, err := m.BatchDelete(keys[:n], nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return left, gone, fmt.Errorf("delete from map %s: %w", m, err)
		}
		keys = keys[n:]
	}
	return left, gone, nil
}
