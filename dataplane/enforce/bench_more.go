package enforce

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// benchCgroup puts this process into a cgroup of its own below the one that it is in, and returns that one's id. leave
// puts everything back.
func benchCgroup() (id uint64, leave func() error, err error) {
	root, err := cgroupMount()
	if err != nil {
		return 0, nil, err
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, nil, fmt.Errorf("read the own cgroup: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			root = filepath.Join(root, path)
		}
	}
	dir := filepath.Join(root, fmt.Sprintf("signet-bench-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return 0, nil, fmt.Errorf("make a cgroup: %w", err)
	}
	leave = func() error {
		return errors.Join(enterCgroup(root), os.Remove(dir))
	}
	if err := enterCgroup(dir); err != nil {
		return 0, nil, errors.Join(err, leave())
	}
	if id, err = CgroupID(dir); err != nil {
		return 0, nil, errors.Join(err, leave())
	}
	return id, leave, nil
}

func enterCgroup(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		return fmt.Errorf("enter cgroup %s: %w", dir, err)
	}
	return nil
}

// cgroupMount is where cgroup v2 is mounted.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	defer f.Close()
	for in := bufio.NewScanner(f); in.Scan(); {
		if w := strings.Fields(in.Text()); len(w) > 2 && w[2] == "cgroup2" {
			return w[1], nil
		}
	}
	return "", fmt.Errorf("find cgroup v2: %w", ErrNoCgroup)
}

// BenchNewFlow measures, in nanoseconds, what the first packet of a flow out of the tunnel costs: the median over many
// flows, each from a port of its own. A test run repeats one packet, so each flow is one run, for which the kernel reports
// its own time, without the system call. What it reports for a program that does nothing, run in turns, is taken off.
// Every run follows a system call, so caches are colder than in BenchEstablished. It needs root and touches nothing that is
// pinned.
func BenchNewFlow(entries int) (netNs float64, err error) {
	const flows = 20000
	b, err := newBenchHost(hookTunnelIngress, entries, benchView(entries, 0))
	if err != nil {
		return 0, err
	}
	defer b.close()
	packet := benchPacket(benchRemote, benchLocal, benchPort, policy.FlagSYN)
	took := [2][]float64{}
	for port := range flows {
		packet[benchSourcePort], packet[benchSourcePort+1] = byte((1024+port)>>8), byte(1024+port)
		for i, prog := range []*ebpf.Program{b.judge, b.idle} {
			code, t, err := prog.Benchmark(packet, 1, nil)
			if err != nil || int32(code) != -1 {
				return 0, fmt.Errorf("flow %d: it returned %d: %w", port, int32(code), err)
			}
			took[i] = append(took[i], float64(t))
		}
	}
	held := 0
	err = each(b.coll.Maps[mapConns4], func(*bpf.JudgeTuple4, *bpf.JudgeConn) bool { held++; return true })
	if err != nil || held != flows {
		return 0, fmt.Errorf("%d flows are tracked, want %d: %w", held, flows, err)
	}
	for i := range took {
		slices.Sort(took[i])
	}
	return took[0][flows/2] - took[1][flows/2], nil
}

// benchSourcePort is where a packet of benchPacket has its source port.
const benchSourcePort = benchLinkHeader + 20

// BenchConnBytes gives the bytes of kernel memory that one tracked IPv4 connection takes: what the kernel accounts for a
// table (memlock in the map's fdinfo) that the given number of entries fill, divided by that number, buckets and all.
func BenchConnBytes(entries int) (perEntry float64, err error) {
	spec, err := bpf.LoadJudge()
	if err != nil {
		return 0, fmt.Errorf("read the judge's object: %w", err)
	}
	table := spec.Maps[mapConns4]
	table.Pinning, table.MaxEntries = ebpf.PinNone, uint32(entries)
	m, err := ebpf.NewMap(table)
	if err != nil {
		return 0, explain(fmt.Errorf("make a table: %w", err))
	}
	defer m.Close()
	empty, err := memlock(m)
	if err != nil {
		return 0, err
	}
	keys, conns := make([]bpf.JudgeTuple4, entries), make([]bpf.JudgeConn, entries)
	for i := range keys {
		keys[i] = bpf.JudgeTuple4{Src: uint32(i), Dst: ^uint32(i), Sport: uint16(i), Dport: benchPort, Proto: uint8(flow.TCP)}
	}
	if err := put(m, keys, conns); err != nil {
		return 0, err
	}
	full, err := memlock(m)
	if err != nil {
		return 0, err
	}
	if full <= empty {
		return 0, fmt.Errorf("this kernel (before 6.4) does not account for what is allocated on demand: %w", errors.ErrUnsupported)
	}
	return full / float64(entries), nil
}

func memlock(m *ebpf.Map) (float64, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("ask about map %s: %w", m, err)
	}
	n, ok := info.Memlock()
	if !ok {
		return 0, fmt.Errorf("map %s: the kernel tells no memory: %w", m, errors.ErrUnsupported)
	}
	return float64(n), nil
}

// Burst is what came of a burst of events.
type Burst struct {
	Sent, Delivered, Lost uint64
	Took                  time.Duration // until everything was accounted for
}

// BenchBurst denies so many packets in a row, as fast as the judge can, while the reader of events runs, and waits until
// each event was delivered or counted as lost, but not longer than half a minute.
func BenchBurst(ctx context.Context, packets int) (Burst, error) {
	const limit = 30 * time.Second
	b, err := newBenchHost(hookTunnelIngress, 10, benchView(10, 0))
	if err != nil {
		return Burst{}, err
	}
	defer b.close()
	if err := b.w.settings(func(s *bpf.JudgeSettings) { s.Wake = wakeBytes }); err != nil {
		return Burst{}, err
	}
	ctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	e := &Enforcer{coll: b.coll}
	var delivered, lost atomic.Uint64
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		close(ready)
		ended <- e.Events(ctx, func(ev Event) {
			lost.Add(ev.LostBefore)
			if ev.Kind == EventDeny {
				delivered.Add(1)
			}
			if delivered.Load()+lost.Load() >= uint64(packets) {
				stop()
			}
		})
	}()
	<-ready
	began := time.Now()
	code, _, err := b.judge.Benchmark(benchPacket(benchRemote, benchLocal, benchPort+1, policy.FlagSYN), packets, nil)
	if err == nil && int32(code) == -1 {
		err = errors.New("the judge let a forbidden packet pass")
	}
	if err != nil {
		stop()
	}
	err = errors.Join(err, <-ended)
	return Burst{Sent: uint64(packets), Delivered: delivered.Load(), Lost: lost.Load(), Took: time.Since(began)}, err
}

// Swap is what came of a change of rulesets.
type Swap struct {
	InForce time.Duration // from the call until a packet was judged by the new one
	Whole   time.Duration // until the old one was taken away too
	Pairs   uint64        // of packets that were judged meanwhile
	Mixed   uint64        // of those, that no order of the two views explains
}

// swapPeers share the ports of a swapped ruleset.
const swapPeers = 100

// swapView has one ruleset of that many entries, from ports of one parity only.
func swapView(entries int, odd uint16) *policy.View {
	v := benchView(2, 0)
	rs := make(policy.Ruleset, entries)
	for i := range entries {
		k := policy.Key{Peer: benchPeer + identity.Number(i%swapPeers), Port: uint16(2+2*(i/swapPeers)) + odd, Proto: flow.TCP, Dir: policy.Ingress}
		rs[k] = policy.Value{Allow: policy.Slot{Rule: uint32(1 + i)}}
	}
	for i := range swapPeers {
		v.Addresses[swapAddress(i)] = policy.Address{Number: benchPeer + identity.Number(i)}
	}
	v.Rulesets = map[identity.Number]policy.Ruleset{benchOwn: rs}
	v.Revision = uint64(odd)
	return v
}

func swapAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 1, byte(9 + i)}) }

// BenchSwap replaces a ruleset of that many entries by one that allows none of the same, while a reader judges pairs of
// packets: one that only the old one allows, then one that only the new one allows. Both allowed means that the new one
// came between; both denied, or the old one after the new one, that a packet was judged by a mix.
func BenchSwap(entries int) (Swap, error) {
	b, err := newBenchHost(hookTunnelIngress, 2*entries, swapView(entries, 0))
	if err != nil {
		return Swap{}, err
	}
	defer b.close()
	next := swapView(entries, 1)
	var s Swap
	var stop atomic.Bool
	var seen time.Time
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		var err error
		seen, err = b.watchSwap(&s, &stop, entries, ready)
		ended <- err
	}()
	<-ready
	began := time.Now()
	_, err = b.w.apply(next)
	s.Whole = time.Since(began)
	stop.Store(true)
	err = errors.Join(err, <-ended)
	if err == nil && seen.IsZero() {
		err = errors.New("no packet was judged by the new ruleset")
	}
	s.InForce = seen.Sub(began)
	return s, err
}

// watchSwap judges pairs until it is stopped, and at least one thereafter; it returns when the new ruleset was first seen.
func (b *benchRun) watchSwap(s *Swap, stop *atomic.Bool, entries int, ready chan<- struct{}) (seen time.Time, err error) {
	packet := benchPacket(benchRemote, benchLocal, 0, policy.FlagSYN)
	src, port := packet[benchLinkHeader+12:][:4], packet[benchSourcePort+2:]
	allowed := func(at int, odd uint16) (bool, error) {
		a, p := swapAddress(at%swapPeers).As4(), uint16(2+2*(at/swapPeers))+odd
		copy(src, a[:])
		port[0], port[1] = byte(p>>8), byte(p)
		code, err := b.judge.Run(&ebpf.RunOptions{Data: packet})
		return int32(code) == -1, err
	}
	for at, last := 0, false; !last; at = (at + 7919) % entries {
		last = stop.Load()
		old, err := allowed(at, 0)
		if err != nil {
			return seen, fmt.Errorf("judge a pair: %w", err)
		}
		now, err := allowed(at, 1)
		if err != nil {
			return seen, fmt.Errorf("judge a pair: %w", err)
		}
		if now && seen.IsZero() {
			seen = time.Now()
		} else if old == now || old && !seen.IsZero() {
			s.Mixed++
		}
		if s.Pairs++; s.Pairs == 100 {
			close(ready)
		}
	}
	return seen, nil
}

// BenchChange gives how long Apply takes, in the median of several, for a View whose one ruleset of ten entries changed
// beside others of so many entries together that stay as they were.
func BenchChange(entries int) (time.Duration, error) {
	const changes = 20
	v := benchView(entries, 0)
	b, err := newBenchHost(hookTunnelIngress, entries+2*changes, v)
	if err != nil {
		return 0, err
	}
	defer b.close()
	var took []time.Duration
	for i := range changes {
		next := *v
		next.Revision = uint64(1 + i)
		next.Rulesets = map[identity.Number]policy.Ruleset{benchOwn: v.Rulesets[benchOwn], benchOwn - 1: {}}
		for port := range uint16(10) {
			k := policy.Key{Peer: benchPeer, Port: 1 + port, Proto: flow.UDP, Dir: policy.Ingress}
			next.Rulesets[benchOwn-1][k] = policy.Value{Allow: policy.Slot{Rule: uint32(1 + i)}}
		}
		began := time.Now()
		if _, err := b.w.apply(&next); err != nil {
			return 0, err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[changes/2], nil
}
