package enforce

import (
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/policy"
)

// ErrTooBig is wrapped when a View does not fit into the kernel's maps; nothing of it is enforced.
var ErrTooBig = errors.New("view does not fit")

// ErrReadBack is wrapped when the kernel does not hold what was written.
var ErrReadBack = errors.New("view was not written completely")

// writer makes Views real, one generation after the other.
//
// A generation is built beside the one in force: addresses, workloads and own addresses are keyed by it, rulesets are
// named by their content and shared by every workload and generation that has the same. When everything is written and
// counted, one word is changed, and from then on every run of a program sees the new generation and nothing of the old.
// Then, and after the last run under the old one is over, what only the old one needed is deleted.
type writer struct {
	m          map[string]*ebpf.Map
	clock      func() clock
	generation uint64
	view       *policy.View // in force; nil before the first one of this process
	base       clock        // by which every stamp in the kernel was made

	rulesets    map[[32]byte]uint32
	counts      map[uint32]int // entries of each ruleset
	nextRuleset uint32
}

// newWriter takes over what the maps hold, and removes what an interrupted writer left.
func newWriter(m map[string]*ebpf.Map, clk func() clock) (*writer, error) {
	w := &writer{m: m, clock: clk, rulesets: map[[32]byte]uint32{}, counts: map[uint32]int{}, nextRuleset: 1}
	var s bpf.JudgeSettings
	if err := m[mapConfig].Lookup(uint32(0), &s); err != nil {
		return nil, fmt.Errorf("read the generation in force: %w", err)
	}
	w.generation = s.Generation
	err := each(m[mapRulesets], func(id *uint32, r *bpf.JudgeRuleset) bool {
		w.rulesets[r.Hash], w.counts[*id] = *id, int(r.Entries)
		w.nextRuleset = max(w.nextRuleset, *id+1)
		return true
	})
	if err != nil {
		return nil, err
	}
	return w, w.clean(w.generation, nil)
}

// apply makes v real. changed is false when v is in force already.
func (w *writer) apply(v *policy.View) (changed bool, err error) {
	if err := v.Validate(); err != nil {
		return false, err
	}
	base := w.base
	if now := w.clock(); w.view == nil || now.drifted(base) {
		base = now
	} else if sameView(w.view, v) {
		return false, nil
	}
	generation := w.generation + 1
	p := w.plan(v, generation, base)
	if err := w.fits(p); err != nil {
		return false, err
	}
	if err := w.build(p, generation); err != nil {
		return false, errors.Join(err, w.clean(w.generation, nil))
	}
	if err := w.flip(v, generation, base); err != nil {
		return false, errors.Join(err, w.clean(w.generation, nil))
	}
	// The old generation is gone for the programs; a failure to tidy up is told, and does not undo the view.
	return true, w.clean(generation, p.used)
}

// flip changes the generation word; before it nothing of the view counts, after it all does.
func (w *writer) flip(v *policy.View, generation uint64, base clock) error {
	scalars := bpf.JudgeView{
		Generation: generation, Revision: v.Revision,
		LeaseEnds: base.stamp(v.Lease.Ends), LeaseMode: uint32(v.Lease.Mode),
	}
	if err := w.m[mapViews].Put(uint32(generation&1), scalars); err != nil {
		return fmt.Errorf("write the scalars of generation %d: %w", generation, err)
	}
	if err := w.settings(func(s *bpf.JudgeSettings) { s.Generation = generation }); err != nil {
		return err
	}
	made := *v
	made.Generation = generation
	w.view, w.base, w.generation = &made, base, generation
	waitForReaders()
	return nil
}

// settings changes the config map; there is no other writer.
func (w *writer) settings(change func(*bpf.JudgeSettings)) error {
	var s bpf.JudgeSettings
	if err := w.m[mapConfig].Lookup(uint32(0), &s); err != nil {
		return fmt.Errorf("read config: %w", err)
	}
	change(&s)
	if err := w.m[mapConfig].Put(uint32(0), s); err != nil {
		return fmt.Errorf("write config: %w", err)
	}
	return nil
}

// waitForReaders returns when every program run that began before has ended: runs are RCU read-side sections, and the
// global memory barrier is a grace period.
func waitForReaders() {
	const membarrierCmdGlobal = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierCmdGlobal, 0, 0); errno != 0 {
		// Refused on hosts with isolated CPUs. No run lasts as long as this.
		time.Sleep(100 * time.Millisecond)
	}
}

func (w *writer) fits(p *plan) error {
	for _, c := range []struct {
		name string
		n    int
	}{{mapAddrs, len(p.addrs)}, {mapLocals, len(p.locals)}, {mapOwns, len(p.owns)}} {
		if limit := int(w.m[c.name].MaxEntries()) / 2; c.n > limit {
			return fmt.Errorf("%w: %d %s, and the kernel's map has room for %d", ErrTooBig, c.n, c.name, limit)
		}
	}
	held, added := 0, 0
	for _, n := range w.counts {
		held += n
	}
	for _, f := range p.missing {
		added += len(f.keys)
	}
	if limit := int(w.m[mapEntries].MaxEntries()); held+added > limit {
		return fmt.Errorf("%w: %d new policy entries beside %d in force, and the kernel's map has room for %d", ErrTooBig, added, held, limit)
	}
	return nil
}

// build writes everything of a plan and reads it back.
func (w *writer) build(p *plan, generation uint64) error {
	for id, f := range p.missing {
		if err := put(w.m[mapEntries], f.keys, f.entries); err != nil {
			return err
		}
		w.counts[id] = len(f.keys)
	}
	if err := w.verifyRulesets(p.missing); err != nil {
		return err
	}
	for id, f := range p.missing {
		row := bpf.JudgeRuleset{Hash: f.hash, Entries: uint32(len(f.keys))}
		if err := w.m[mapRulesets].Put(id, row); err != nil {
			return fmt.Errorf("note ruleset %d: %w", id, err)
		}
		w.rulesets[f.hash] = id
	}
	w.nextRuleset = p.next
	if err := put(w.m[mapAddrs], p.addrKeys, p.addrs); err != nil {
		return err
	}
	if err := put(w.m[mapLocals], p.localKeys, p.locals); err != nil {
		return err
	}
	if err := put(w.m[mapOwns], p.ownKeys, p.owns); err != nil {
		return err
	}
	return w.verifyKeyed(p, generation)
}

// verifyRulesets counts the entries of new rulesets in the kernel.
func (w *writer) verifyRulesets(missing map[uint32]fresh) error {
	if len(missing) == 0 {
		return nil
	}
	found := map[uint32]int{}
	err := each(w.m[mapEntries], func(k *bpf.JudgeEntryKey, _ *bpf.JudgeEntry) bool {
		found[k.Ruleset]++
		return true
	})
	if err != nil {
		return err
	}
	for id, f := range missing {
		if found[id] != len(f.keys) {
			return fmt.Errorf("%w: ruleset %d has %d entries of %d", ErrReadBack, id, found[id], len(f.keys))
		}
	}
	return nil
}

// verifyKeyed counts what the kernel holds under the new generation.
func (w *writer) verifyKeyed(p *plan, generation uint64) error {
	var addrs, locals, owns int
	err := errors.Join(
		each(w.m[mapAddrs], func(k *bpf.JudgeAddrKey, _ *bpf.JudgeAddr) bool {
			addrs += one(k.Generation == generation)
			return true
		}),
		each(w.m[mapLocals], func(k *bpf.JudgeLocalKey, _ *uint32) bool {
			locals += one(k.Generation == generation)
			return true
		}),
		each(w.m[mapOwns], func(k *bpf.JudgeOwnKey, _ *bpf.JudgeOwn) bool {
			owns += one(k.Generation == generation)
			return true
		}))
	if err != nil {
		return err
	}
	if addrs != len(p.addrs) || locals != len(p.locals) || owns != len(p.owns) {
		return fmt.Errorf("%w: %d addresses of %d, %d selectors of %d, %d workloads of %d", ErrReadBack,
			addrs, len(p.addrs), locals, len(p.locals), owns, len(p.owns))
	}
	return nil
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// clean deletes what does not belong to the generation in force. used names its rulesets; nil keeps all that are whole.
func (w *writer) clean(generation uint64, used map[uint32]bool) error {
	_, _, err1 := purge(w.m[mapAddrs], func(k *bpf.JudgeAddrKey, _ *bpf.JudgeAddr) bool { return k.Generation != generation })
	_, _, err2 := purge(w.m[mapLocals], func(k *bpf.JudgeLocalKey, _ *uint32) bool { return k.Generation != generation })
	_, _, err3 := purge(w.m[mapOwns], func(k *bpf.JudgeOwnKey, _ *bpf.JudgeOwn) bool { return k.Generation != generation })
	return errors.Join(err1, err2, err3, w.cleanRulesets(used))
}

// cleanRulesets forgets a ruleset before its entries go, so that an interruption never leaves half of one under a name.
func (w *writer) cleanRulesets(used map[uint32]bool) error {
	kept := map[uint32]bool{}
	for hash, id := range w.rulesets {
		if used == nil || used[id] {
			kept[id] = true
			continue
		}
		if err := w.m[mapRulesets].Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget ruleset %d: %w", id, err)
		}
		delete(w.rulesets, hash)
	}
	if used != nil && len(kept) == len(w.counts) {
		return nil
	}
	found := map[uint32]int{}
	_, _, err := purge(w.m[mapEntries], func(k *bpf.JudgeEntryKey, _ *bpf.JudgeEntry) bool {
		found[k.Ruleset]++
		return !kept[k.Ruleset]
	})
	if err != nil {
		return err
	}
	maps.DeleteFunc(w.counts, func(id uint32, _ int) bool { return !kept[id] })
	return w.dropDamaged(found)
}

// dropDamaged makes sure that a ruleset which is not whole is never given to a workload again.
func (w *writer) dropDamaged(found map[uint32]int) error {
	for hash, id := range w.rulesets {
		if found[id] == w.counts[id] {
			continue
		}
		if err := w.m[mapRulesets].Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget damaged ruleset %d: %w", id, err)
		}
		delete(w.rulesets, hash)
	}
	return nil
}

// extendLease writes the lease's end of the generation in force. One word changes; whoever reads it sees either end.
func (w *writer) extendLease(next *policy.View) error {
	scalars := bpf.JudgeView{
		Generation: w.generation, Revision: next.Revision,
		LeaseEnds: w.base.stamp(next.Lease.Ends), LeaseMode: uint32(next.Lease.Mode),
	}
	if err := w.m[mapViews].Put(uint32(w.generation&1), scalars); err != nil {
		return fmt.Errorf("write the lease: %w", err)
	}
	w.view = next
	return nil
}
