package enforce

import (
	"errors"
	"fmt"
	"maps"
	"time"
	"unsafe"

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

	live        map[uint32]*ruleset // what the kernel holds, by its number
	byHash      map[[32]byte]uint32
	cache       map[unsafe.Pointer]*ruleset // by the Ruleset that each was made of; those of the View in force
	nextRuleset uint32
	windows     map[window]uint32
	nextWindow  uint32
}

// newWriter takes over what the maps hold, and removes what an interrupted writer left.
func newWriter(m map[string]*ebpf.Map, clk func() clock) (*writer, error) {
	w := &writer{
		m: m, clock: clk, live: map[uint32]*ruleset{}, byHash: map[[32]byte]uint32{}, cache: map[unsafe.Pointer]*ruleset{},
		nextRuleset: 1, windows: map[window]uint32{}, nextWindow: 1,
	}
	var s bpf.JudgeSettings
	if err := m[mapConfig].Lookup(uint32(0), &s); err != nil {
		return nil, fmt.Errorf("read the generation in force: %w", err)
	}
	w.generation = s.Generation
	err := errors.Join(
		each(m[mapRulesets], func(id *uint32, r *bpf.JudgeRuleset) bool {
			w.live[*id] = &ruleset{hash: r.Hash, id: *id, entries: int(r.Entries), ranges: int(r.Ranges)}
			w.byHash[r.Hash] = *id
			w.nextRuleset = max(w.nextRuleset, *id+1)
			return true
		}),
		each(m[mapWindows], func(id *uint32, win *bpf.JudgeWindow) bool {
			w.windows[window{win.NotBefore, win.NotAfter}] = *id
			w.nextWindow = max(w.nextWindow, *id+1)
			return true
		}))
	if err != nil {
		return nil, err
	}
	return w, errors.Join(w.cleanKeyed(w.generation), w.cleanStrays())
}

// cleanStrays deletes entries without a ruleset, and makes sure that a ruleset which is not whole is never given to a
// workload again. (Its entries stay while a workload has it.)
func (w *writer) cleanStrays() error {
	entries, ranges := map[uint32]int{}, map[uint32]int{}
	_, _, err1 := purge(w.m[mapEntries], func(k *bpf.JudgeEntryKey, _ *bpf.JudgeEntry) bool {
		entries[k.Ruleset]++
		return w.live[k.Ruleset] == nil
	})
	err2 := purgeRanges(w.m[mapRanges], func(k *bpf.JudgeRangeKey) bool {
		ranges[k.Ruleset]++
		return w.live[k.Ruleset] == nil
	})
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	for id, rs := range w.live {
		if entries[id] == rs.entries && ranges[id] == rs.ranges {
			continue
		}
		if err := w.m[mapRulesets].Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget damaged ruleset %d: %w", id, err)
		}
		delete(w.byHash, rs.hash)
	}
	return nil
}

// apply makes v real. changed is false when v is in force already.
func (w *writer) apply(v *policy.View) (changed bool, err error) {
	if err := v.ValidateNew(func(rs policy.Ruleset) bool { return w.cache[identityOf(rs)] != nil }); err != nil {
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
		return false, errors.Join(err, w.undo(p))
	}
	if err := w.flip(v, generation, base); err != nil {
		return false, errors.Join(err, w.undo(p))
	}
	// The old generation is gone for the programs; a failure to tidy up is told, and does not undo the view.
	maps.DeleteFunc(w.cache, func(rules unsafe.Pointer, _ *ruleset) bool { _, ok := p.seen[rules]; return !ok })
	return true, errors.Join(w.cleanKeyed(generation), w.cleanRulesets(p.used), w.settleTraits(v))
}

// undo removes what was built of a plan that is not to be.
func (w *writer) undo(p *plan) error {
	errs := []error{w.cleanKeyed(w.generation)}
	for _, rs := range p.missing {
		if err := w.m[mapRulesets].Delete(rs.id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("forget ruleset %d: %w", rs.id, err))
		}
		delete(w.byHash, rs.hash)
		delete(w.live, rs.id)
		errs = append(errs, w.erase(rs))
	}
	clear(w.cache)
	return errors.Join(append(errs, w.cleanWindows())...)
}

// settleTraits tells the programs that they need not ask about workloads' own policy any more. That some workload has
// one is told before the view is in force.
func (w *writer) settleTraits(v *policy.View) error {
	if len(v.Traits) > 0 {
		return nil
	}
	return w.settings(func(s *bpf.JudgeSettings) { s.Traits = 0 })
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
	if len(v.Traits) > 0 {
		if err := w.settings(func(s *bpf.JudgeSettings) { s.Traits = 1 }); err != nil {
			return err
		}
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
	}{{mapAddrs, len(p.addrs)}, {mapLocals, len(p.locals)}, {mapOwns, len(p.owns)}, {mapIfaces, len(p.ifaces)}} {
		if limit := int(w.m[c.name].MaxEntries()) / 2; c.n > limit {
			return fmt.Errorf("%w: %d %s, and the kernel's map has room for %d", ErrTooBig, c.n, c.name, limit)
		}
	}
	var held, added struct{ entries, ranges, windows int }
	held.windows = len(w.windows)
	for _, rs := range w.live {
		held.entries += rs.entries
		held.ranges += rs.ranges
	}
	for _, rs := range p.missing {
		added.entries += rs.entries
		added.ranges += rs.ranges
		for win := range rs.windows {
			if _, ok := w.windows[win]; !ok {
				added.windows++
			}
		}
	}
	for _, c := range []struct {
		name, what  string
		held, added int
	}{
		{mapEntries, "policy entries", held.entries, added.entries}, {mapRanges, "port ranges", held.ranges, added.ranges},
		{mapWindows, "times", held.windows, added.windows},
	} {
		if limit := int(w.m[c.name].MaxEntries()); c.held+c.added > limit {
			return fmt.Errorf("%w: %d new %s beside %d in force, and the kernel's map has room for %d", ErrTooBig, c.added, c.what, c.held, limit)
		}
	}
	return nil
}

// build writes everything of a plan and reads it back.
func (w *writer) build(p *plan, generation uint64) error {
	if err := w.writeWindows(p.missing); err != nil {
		return err
	}
	for _, rs := range p.missing {
		if err := w.write(rs); err != nil {
			return err
		}
	}
	if err := w.verifyRulesets(p.missing); err != nil {
		return err
	}
	for _, rs := range p.missing {
		row := bpf.JudgeRuleset{Hash: rs.hash, Entries: uint32(rs.entries), Ranges: uint32(rs.ranges)}
		if err := w.m[mapRulesets].Put(rs.id, row); err != nil {
			return fmt.Errorf("note ruleset %d: %w", rs.id, err)
		}
		w.byHash[rs.hash], w.live[rs.id] = rs.id, rs
	}
	w.nextRuleset = p.next
	err := errors.Join(
		put(w.m[mapAddrs], p.addrKeys, p.addrs), put(w.m[mapLocals], p.localKeys, p.locals),
		put(w.m[mapOwns], p.ownKeys, p.owns), put(w.m[mapIfaces], p.ifaceKeys, p.ifaces))
	if err != nil {
		return err
	}
	return w.verifyKeyed(p, generation)
}

// verifyKeyed counts what the kernel holds under the new generation.
func (w *writer) verifyKeyed(p *plan, generation uint64) error {
	var addrs, locals, owns, ifaces int
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
		}),
		each(w.m[mapIfaces], func(k *bpf.JudgeIfaceKey, _ *uint32) bool {
			ifaces += one(k.Generation == generation)
			return true
		}))
	if err != nil {
		return err
	}
	if addrs != len(p.addrs) || locals != len(p.locals) || owns != len(p.owns) || ifaces != len(p.ifaces) {
		return fmt.Errorf("%w: %d addresses of %d, %d selectors of %d, %d workloads of %d, %d devices of %d", ErrReadBack,
			addrs, len(p.addrs), locals, len(p.locals), owns, len(p.owns), ifaces, len(p.ifaces))
	}
	return nil
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// cleanKeyed deletes what is keyed by another generation than the one in force.
func (w *writer) cleanKeyed(generation uint64) error {
	_, _, err1 := purge(w.m[mapAddrs], func(k *bpf.JudgeAddrKey, _ *bpf.JudgeAddr) bool { return k.Generation != generation })
	_, _, err2 := purge(w.m[mapLocals], func(k *bpf.JudgeLocalKey, _ *uint32) bool { return k.Generation != generation })
	_, _, err3 := purge(w.m[mapOwns], func(k *bpf.JudgeOwnKey, _ *bpf.JudgeOwn) bool { return k.Generation != generation })
	_, _, err4 := purge(w.m[mapIfaces], func(k *bpf.JudgeIfaceKey, _ *uint32) bool { return k.Generation != generation })
	return errors.Join(err1, err2, err3, err4)
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
