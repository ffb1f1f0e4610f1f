package enforce

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// count is how many entries a map has.
func count[K, V any](t *testing.T, m *ebpf.Map) (n int) {
	t.Helper()
	must(t, each(m, func(*K, *V) bool { n++; return true }), "count")
	return n
}

func (k *twin) entries(t *testing.T) int {
	return count[bpf.JudgeEntryKey, bpf.JudgeEntry](t, k.coll.Maps[mapEntries])
}

func (k *twin) addrs(t *testing.T) int {
	return count[bpf.JudgeAddrKey, bpf.JudgeAddr](t, k.coll.Maps[mapAddrs])
}

// small is a view of one local workload with n entries and n addresses of others.
func small(n int) *policy.View {
	v := &policy.View{
		Overlay4: overlay4, Overlay6: overlay6, Lease: policy.Lease{Ends: policytest.Now.Add(time.Hour)},
		Addresses: map[netip.Addr]policy.Address{a4: {Number: numA, Local: true}},
		Rulesets:  map[identity.Number]policy.Ruleset{numA: {}},
	}
	addr := remote4
	for i := range n {
		v.Rulesets[numA][policy.Key{Peer: numRemote, Port: uint16(i + 1), Proto: flow.TCP}] = policy.Value{Allow: policy.Slot{Rule: 1}}
		v.Addresses[addr] = policy.Address{Number: numRemote}
		addr = addr.Next()
	}
	return v
}

func TestApply(t *testing.T) {
	needRoot(t)
	k := newTwin(t, overlay4, overlay6)
	apply := func(v *policy.View, wantChange bool) {
		t.Helper()
		changed, err := k.w.apply(v)
		must(t, err, "apply")
		if changed != wantChange {
			t.Errorf("changed: %v, want %v", changed, wantChange)
		}
	}
	apply(small(10), true)
	apply(small(10), false) // the same again
	if k.w.generation != 1 || k.entries(t) != 10 || k.addrs(t) != 11 {
		t.Errorf("generation %d, %d entries, %d addresses", k.w.generation, k.entries(t), k.addrs(t))
	}
	// A second workload with equal rules shares the ruleset.
	v := small(10)
	v.Rulesets[numB] = small(10).Rulesets[numA]
	apply(v, true)
	if len(k.w.byHash) != 1 || k.entries(t) != 10 {
		t.Errorf("%d rulesets with %d entries, want 1 with 10", len(k.w.byHash), k.entries(t))
	}
	// What is not needed any more goes.
	apply(small(3), true)
	if len(k.w.byHash) != 1 || k.entries(t) != 3 || k.addrs(t) != 4 {
		t.Errorf("%d rulesets, %d entries, %d addresses", len(k.w.byHash), k.entries(t), k.addrs(t))
	}
	// A clock that was set makes the stamps anew.
	k.now.wall = k.now.wall.Add(2 * maxDrift)
	apply(small(3), true)
	apply(&policy.View{Overlay4: overlay4, Overlay6: overlay6}, true)
	if k.entries(t) != 0 || k.addrs(t) != 0 || len(k.w.byHash) != 0 {
		t.Errorf("%d entries, %d addresses are left of nothing", k.entries(t), k.addrs(t))
	}
}

// TestApplyAllOrNothing: a view that does not fit changes nothing, and leaves nothing behind.
func TestApplyAllOrNothing(t *testing.T) {
	needRoot(t)
	k := newTwin(t, overlay4, overlay6)
	_, err := k.w.apply(small(10))
	must(t, err, "apply")
	limit := int(k.coll.Maps[mapAddrs].MaxEntries()) / 2
	tooBig := small(10)
	addr := remote4
	for range limit + 1 {
		tooBig.Addresses[addr] = policy.Address{Number: numRemote}
		addr = addr.Next()
	}
	if _, err := k.w.apply(tooBig); !errors.Is(err, ErrTooBig) {
		t.Errorf("got %v, want ErrTooBig", err)
	}
	outside := small(1)
	outside.Addresses[netip.MustParseAddr("10.0.0.1")] = policy.Address{Number: numRemote}
	if _, err := k.w.apply(outside); !errors.Is(err, policy.ErrView) {
		t.Errorf("got %v, want ErrView", err)
	}
	if k.w.generation != 1 || k.entries(t) != 10 || k.addrs(t) != 11 {
		t.Errorf("generation %d, %d entries, %d addresses", k.w.generation, k.entries(t), k.addrs(t))
	}
}

// TestApplyMakesRoom: a policy that does not fit beside the old one replaces it all the same, and one that never fits
// leaves nothing of the old one in force.
func TestApplyMakesRoom(t *testing.T) {
	l := newLab(t)
	l.cfg.Sizes.Entries = 100
	e := l.open()
	// rules are n entries of A, on ports from a first one on.
	rules := func(first, n int) *policy.View {
		v := l.view()
		for i := range n {
			permit(v, uint32(first), numA, numRemote, flow.UDP, uint16(first+i))
		}
		return v
	}
	must(t, e.Apply(context.Background(), rules(1000, 60)), "apply")
	a := l.start("a")
	a.do("socket udp4")
	a.want("ok", "sendto 198.18.1.9:1000 x")
	must(t, e.Apply(context.Background(), rules(2000, 59)), "replace")
	a.want("EACCES", "sendto 198.18.1.9:1000 x")
	a.want("ok", "sendto 198.18.1.9:2000 x")
	if err := e.Apply(context.Background(), rules(3000, 101)); !errors.Is(err, ErrTooBig) {
		t.Errorf("got %v, want ErrTooBig", err)
	}
	a.want("EACCES", "sendto 198.18.1.9:2000 x")
	a.want("EACCES", "sendto 198.18.1.9:3000 x")
	must(t, e.Apply(context.Background(), rules(1000, 100)), "apply after all was denied")
	a.want("ok", "sendto 198.18.1.9:1099 x")
}

// TestDefaultSizes: what Validate lets pass fits, and two of the coordinator's largest policies fit beside each other.
func TestDefaultSizes(t *testing.T) {
	n := Sizes{}.withDefaults().mapEntries()
	compiled := uint32(policy.MaxEntries / 2) // coordinator/compile
	if n[mapAddrs] < 2*policy.MaxAddresses || n[mapLocals] < 2*policy.MaxLocals || n[mapRulesets] < 2*policy.MaxRulesets || n[mapEntries] < 2*compiled {
		t.Errorf("the maps are too small for a view: %v", n)
	}
	const bucket, sane = 16, 64 << 20
	bytes := uint32(0)
	for name, size := range n {
		if name != mapEvents {
			bytes += bucket * size
		}
	}
	if bytes > sane {
		t.Errorf("an idle host pays %d MiB for hash buckets", bytes>>20)
	}
	t.Logf("%d KiB of hash buckets", bytes>>10)
}

// TestTakeOver: a new writer keeps what is whole, and removes what an interrupted one left.
func TestTakeOver(t *testing.T) {
	needRoot(t)
	k := newTwin(t, overlay4, overlay6)
	v := small(10)
	v.Rulesets[numB] = small(5).Rulesets[numA]
	_, err := k.w.apply(v)
	must(t, err, "apply")
	// Half of a generation, a ruleset without a name, and one with a hole.
	must(t, k.coll.Maps[mapAddrs].Put(bpf.JudgeAddrKey{Generation: 2}, bpf.JudgeAddr{}), "leave an address")
	must(t, k.coll.Maps[mapEntries].Put(bpf.JudgeEntryKey{Ruleset: 99}, bpf.JudgeEntry{}), "leave an entry")
	small5 := k.w.byHash[encodeRuleset(v.Rulesets[numB], k.w.base).hash]
	must(t, k.coll.Maps[mapEntries].Delete(bpf.JudgeEntryKey{Ruleset: small5, Peer: uint32(numRemote), Port: 3, Proto: 6}), "make a hole")
	next, err := newWriter(k.coll.Maps, k.w.clock)
	must(t, err, "take over")
	k.w = next
	if next.generation != 1 || len(next.byHash) != 1 || k.addrs(t) != 11 {
		t.Errorf("generation %d, %d whole rulesets, %d addresses", next.generation, len(next.byHash), k.addrs(t))
	}
	_, err = next.apply(v)
	must(t, err, "apply after taking over")
	if k.entries(t) != 15 || len(next.byHash) != 2 || next.generation != 2 {
		t.Errorf("%d entries in %d rulesets, generation %d", k.entries(t), len(next.byHash), next.generation)
	}
}

func TestClock(t *testing.T) {
	c := clock{wall: policytest.Now, mono: 1e12}
	for _, d := range []time.Duration{-500 * time.Second, 0, 1, time.Hour, 1000 * time.Hour} {
		if got := c.time(c.stamp(policytest.Now.Add(d))); !got.Equal(policytest.Now.Add(d)) {
			t.Errorf("%v: got %v", d, got)
		}
	}
	if c.stamp(time.Time{}) != 0 || !c.time(0).IsZero() {
		t.Error("the zero time is not 0")
	}
	if c.stamp(policytest.Now.Add(-time.Hour*1000)) != 1 {
		t.Error("an instant before the machine started is not the first one")
	}
	if got := c.stamp(policytest.Now.Add(1<<63 - 1)); got != 1<<63-1 {
		t.Errorf("an instant beyond the clock's end is %d", got)
	}
	later := clock{wall: c.wall.Add(time.Hour), mono: c.mono + int64(time.Hour)}
	if later.drifted(c) || !(clock{wall: later.wall.Add(time.Second), mono: later.mono}).drifted(c) {
		t.Error("drift is not told")
	}
}

func TestCheckKernel(t *testing.T) {
	for _, c := range []struct {
		major, minor int
		want         error
	}{{4, 19, ErrOldKernel}, {5, 9, ErrOldKernel}, {5, 10, nil}, {6, 5, nil}, {7, 0, nil}} {
		if err := checkKernel(c.major, c.minor); !errors.Is(err, c.want) {
			t.Errorf("%d.%d: got %v, want %v", c.major, c.minor, err, c.want)
		}
	}
}

func TestConfig(t *testing.T) {
	good := Config{BPFFS: "/x", CgroupRoot: "/y", Overlay4: overlay4, Overlay6: overlay6}
	if _, err := good.complete(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Config){
		"no pins":          func(c *Config) { c.BPFFS = "" },
		"no cgroup":        func(c *Config) { c.CgroupRoot = "" },
		"no overlay":       func(c *Config) { c.Overlay4 = netip.Prefix{} },
		"families swapped": func(c *Config) { c.Overlay4, c.Overlay6 = c.Overlay6, c.Overlay4 },
		"everything":       func(c *Config) { c.Overlay4 = netip.MustParsePrefix("0.0.0.0/0") },
	} {
		bad := good
		change(&bad)
		if _, err := Open(bad); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: got %v, want ErrConfig", name, err)
		}
	}
	dir := t.TempDir()
	good.CgroupRoot = dir
	if _, err := Open(good); !errors.Is(err, ErrNoCgroup) {
		t.Errorf("got %v, want ErrNoCgroup", err)
	}
	if err := MountBPFFS(dir + "/pins"); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("got %v, want ErrNoBPFFS", err)
	}
}
