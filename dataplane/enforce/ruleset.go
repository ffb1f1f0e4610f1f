package enforce

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/policy"
)

// ruleset is one ruleset on its way to the kernel, or there.
type ruleset struct {
	rules policy.Ruleset // what it was made of, and what its keys are made of again
	base  clock          // by which its stamps were made
	hash  [32]byte
	id    uint32 // the kernel's number; 0 while it has none

	entries, ranges int
	windows         map[window]struct{}
}

// window is the time in which a rule counts, in the kernel's stamps. The zero window is always, and has no number.
type window struct{ notBefore, notAfter uint64 }

// number is what workloads name the ruleset by.
func (rs *ruleset) number() uint32 {
	if rs.ranges > 0 {
		return rs.id | bpf.RulesetRanges
	}
	return rs.id
}

// encodeRuleset hashes and counts. The hash is the sum of the entries' hashes, so that it does not depend on an order:
// to sort a million entries would take longer than to write them.
func encodeRuleset(rules policy.Ruleset, base clock) *ruleset {
	rs := &ruleset{rules: rules, base: base, windows: map[window]struct{}{}}
	var sum [4]uint64
	var buf []byte
	for k, v := range rules {
		if k.Bits > 0 {
			rs.ranges++
		} else {
			rs.entries++
		}
		buf = binary.LittleEndian.AppendUint32(buf[:0], uint32(k.Peer))
		buf = binary.LittleEndian.AppendUint16(buf, k.Port)
		buf = append(buf, uint8(k.Proto), uint8(k.Dir), k.Bits)
		for _, s := range [...]policy.Slot{v.Allow, v.Deny, v.Audit} {
			w := windowOf(s, base)
			if w != (window{}) {
				rs.windows[w] = struct{}{}
			}
			buf = binary.LittleEndian.AppendUint32(buf, s.Rule)
			buf = binary.LittleEndian.AppendUint64(buf, w.notBefore)
			buf = binary.LittleEndian.AppendUint64(buf, w.notAfter)
			if s.Audit {
				buf = append(buf, 1)
			} else {
				buf = append(buf, 0)
			}
		}
		h := sha256.Sum256(buf)
		for i := range sum {
			sum[i] += binary.LittleEndian.Uint64(h[8*i:])
		}
	}
	for i, s := range sum {
		binary.LittleEndian.PutUint64(rs.hash[8*i:], s)
	}
	return rs
}

func windowOf(s policy.Slot, base clock) window {
	if !s.Present() {
		return window{}
	}
	return window{base.stamp(s.NotBefore), base.stamp(s.NotAfter)}
}

// keys gives the keys of the entries, and of the ranges.
func (rs *ruleset) keys() (entries []bpf.JudgeEntryKey, ranges []bpf.JudgeRangeKey) {
	entries, ranges = make([]bpf.JudgeEntryKey, 0, rs.entries), make([]bpf.JudgeRangeKey, 0, rs.ranges)
	for k := range rs.rules {
		if k.Bits > 0 {
			ranges = append(ranges, rs.rangeKey(k))
		} else {
			entries = append(entries, rs.entryKey(k))
		}
	}
	return entries, ranges
}

func (rs *ruleset) entryKey(k policy.Key) bpf.JudgeEntryKey {
	return bpf.JudgeEntryKey{Ruleset: rs.id, Peer: uint32(k.Peer), Port: k.Port, Proto: uint8(k.Proto), Dir: uint8(k.Dir)}
}

func (rs *ruleset) rangeKey(k policy.Key) bpf.JudgeRangeKey {
	return bpf.JudgeRangeKey{
		Prefixlen: bpf.RangeFixed + uint32(k.Bits), Ruleset: rs.id, Peer: uint32(k.Peer), Port: k.Port<<8 | k.Port>>8,
		Proto: uint8(k.Proto), Dir: uint8(k.Dir),
	}
}

// write puts a ruleset into the kernel. Its windows are there already.
func (w *writer) write(rs *ruleset) error {
	entryKeys, rangeKeys := make([]bpf.JudgeEntryKey, 0, rs.entries), make([]bpf.JudgeRangeKey, 0, rs.ranges)
	entries, ranges := make([]bpf.JudgeEntry, 0, rs.entries), make([]bpf.JudgeEntry, 0, rs.ranges)
	for k, v := range rs.rules {
		var e bpf.JudgeEntry
		e.Allow.Rule, e.Allow.Window = w.slot(v.Allow, rs.base)
		e.Deny.Rule, e.Deny.Window = w.slot(v.Deny, rs.base)
		e.Audit.Rule, e.Audit.Window = w.slot(v.Audit, rs.base)
		if k.Bits > 0 {
			rangeKeys, ranges = append(rangeKeys, rs.rangeKey(k)), append(ranges, e)
		} else {
			entryKeys, entries = append(entryKeys, rs.entryKey(k)), append(entries, e)
		}
	}
	if err := put(w.m[mapEntries], entryKeys, entries); err != nil {
		return err
	}
	for i, k := range rangeKeys { // there are few, and not every kernel writes tries in batches
		if err := w.m[mapRanges].Put(k, ranges[i]); err != nil {
			return fmt.Errorf("write map %s: %w", mapRanges, err)
		}
	}
	return nil
}

func (w *writer) slot(s policy.Slot, base clock) (rule, times uint32) {
	if win := windowOf(s, base); win != (window{}) {
		times = w.windows[win]
	}
	if s.Audit && s.Present() {
		times |= bpf.SlotLenient
	}
	return s.Rule, times
}

// writeWindows numbers the windows of new rulesets and writes them, before anything can refer to them.
func (w *writer) writeWindows(missing []*ruleset) error {
	for _, rs := range missing {
		for win := range rs.windows {
			if _, ok := w.windows[win]; ok {
				continue
			}
			if err := w.m[mapWindows].Put(w.nextWindow, bpf.JudgeWindow{NotBefore: win.notBefore, NotAfter: win.notAfter}); err != nil {
				return fmt.Errorf("write map %s: %w", mapWindows, err)
			}
			w.windows[win] = w.nextWindow
			w.nextWindow++
		}
	}
	return nil
}

// verifyRulesets reads new rulesets back. Few entries are looked up one by one; where they are a good part of all, to
// walk the whole map is faster.
func (w *writer) verifyRulesets(missing []*ruleset) error {
	added, held := 0, 0
	for _, rs := range missing {
		added += rs.entries
	}
	for _, rs := range w.live {
		held += rs.entries
	}
	const walkCosts = 8 // entries that are walked over in the time of one look-up
	if added*walkCosts < held {
		return w.verifyEach(missing)
	}
	found := map[uint32]int{}
	err := each(w.m[mapEntries], func(k *bpf.JudgeEntryKey, _ *bpf.JudgeEntry) bool {
		found[k.Ruleset]++
		return true
	})
	if err != nil {
		return err
	}
	for _, rs := range missing {
		if found[rs.id] != rs.entries {
			return fmt.Errorf("%w: ruleset %d has %d entries of %d", ErrReadBack, rs.id, found[rs.id], rs.entries)
		}
	}
	return w.verifyRanges(missing)
}

func (w *writer) verifyEach(missing []*ruleset) error {
	var e bpf.JudgeEntry
	for _, rs := range missing {
		keys, _ := rs.keys()
		for _, k := range keys {
			if err := w.m[mapEntries].Lookup(k, &e); err != nil {
				return fmt.Errorf("%w: ruleset %d: %w", ErrReadBack, rs.id, err)
			}
		}
	}
	return w.verifyRanges(missing)
}

func (w *writer) verifyRanges(missing []*ruleset) error {
	var e bpf.JudgeEntry
	for _, rs := range missing {
		_, keys := rs.keys()
		for _, k := range keys {
			if err := w.m[mapRanges].Lookup(k, &e); err != nil {
				return fmt.Errorf("%w: ruleset %d: ranges: %w", ErrReadBack, rs.id, err)
			}
		}
	}
	return nil
}

// erase deletes the entries of a ruleset that nobody can find any more.
func (w *writer) erase(rs *ruleset) error {
	entries, ranges := rs.keys()
	for len(entries) > 0 {
		n := min(batch, len(entries))
		if err := deleteAll(w.m[mapEntries], entries[:n]); err != nil {
			return err
		}
		entries = entries[n:]
	}
	for _, k := range ranges {
		if err := w.m[mapRanges].Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", mapRanges, err)
		}
	}
	return nil
}

// deleteAll deletes keys, some of which may be gone. A batch ends at the first that is.
func deleteAll[K any](m *ebpf.Map, keys []K) error {
	for len(keys) > 0 {
		n, err := m.BatchDelete(keys, nil)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", m, err)
		}
		keys = keys[min(n+1, len(keys)):]
	}
	return nil
}

// cleanRulesets forgets a ruleset before its entries go, so that an interruption never leaves half of one under a name;
// and windows after the last entry that refers to them.
func (w *writer) cleanRulesets(used map[uint32]*ruleset) error {
	for id, rs := range w.live {
		if used[id] != nil {
			continue
		}
		if err := w.m[mapRulesets].Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget ruleset %d: %w", id, err)
		}
		if w.byHash[rs.hash] == id { // a damaged one has a successor of the same content
			delete(w.byHash, rs.hash)
		}
		if rs.rules == nil { // left by an earlier process: what it held is found by its number
			if err := w.eraseNumber(id); err != nil {
				return err
			}
		} else if err := w.erase(rs); err != nil {
			return err
		}
		delete(w.live, id)
	}
	return w.cleanWindows()
}

func (w *writer) eraseNumber(id uint32) error {
	_, _, err1 := purge(w.m[mapEntries], func(k *bpf.JudgeEntryKey, _ *bpf.JudgeEntry) bool { return k.Ruleset == id })
	return errors.Join(err1, purgeRanges(w.m[mapRanges], func(k *bpf.JudgeRangeKey) bool { return k.Ruleset == id }))
}

// purgeRanges walks a trie one by one: not every kernel does it in batches.
func purgeRanges(m *ebpf.Map, stale func(*bpf.JudgeRangeKey) bool) error {
	var gone []bpf.JudgeRangeKey
	var k bpf.JudgeRangeKey
	var e bpf.JudgeEntry
	all := m.Iterate()
	for all.Next(&k, &e) {
		if stale(&k) {
			gone = append(gone, k)
		}
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("read map %s: %w", mapRanges, err)
	}
	for _, k := range gone {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", mapRanges, err)
		}
	}
	return nil
}

// cleanWindows deletes the windows that no ruleset refers to. While one is there whose content is not known, none goes.
func (w *writer) cleanWindows() error {
	used := map[window]struct{}{}
	for _, rs := range w.live {
		if rs.rules == nil {
			return nil
		}
		for win := range rs.windows {
			used[win] = struct{}{}
		}
	}
	for win, id := range w.windows {
		if _, ok := used[win]; ok {
			continue
		}
		if err := w.m[mapWindows].Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", mapWindows, err)
		}
		delete(w.windows, win)
	}
	return nil
}
