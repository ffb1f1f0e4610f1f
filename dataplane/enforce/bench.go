package enforce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// benchRuns is how often each program runs for one figure; the best of benchRounds is taken, because everything that
// disturbs a run makes it slower.
const (
	benchRuns   = 1 << 20
	benchRounds = 10
)

// BenchEstablished measures, in nanoseconds, what the judge costs a packet of an established flow out of the tunnel,
// beside the given number of policy entries. What the harness itself costs, measured with a program that does nothing
// and interleaved with the judge, is taken off. It needs root and touches nothing that is pinned.
func BenchEstablished(entries int) (netNs float64, err error) {
	return benchEstablished(hookTunnelIngress, entries, benchView(entries, 0), benchRemote, benchLocal)
}

// BenchEstablishedCgroup measures the same for a packet into the tunnel, whose socket's cgroup is checked. The harness
// gives the packet a socket of the caller's cgroup; the root's sockets are the kernel's own, so this process is put into
// a cgroup of its own meanwhile.
func BenchEstablishedCgroup(entries int) (netNs float64, err error) {
	own, leave, err := benchCgroup()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, leave()) }()
	return benchEstablished(hookTunnelEgress, entries, benchView(entries, own), benchLocal, benchRemote)
}

func benchEstablished(hook string, entries int, v *policy.View, src, dst netip.Addr) (float64, error) {
	b, err := newBenchHost(hook, entries, v)
	if err != nil {
		return 0, err
	}
	defer b.close()
	if code, err := b.judge.Run(&ebpf.RunOptions{Data: benchPacket(src, dst, benchPort, policy.FlagSYN)}); err != nil || int32(code) != -1 {
		return 0, fmt.Errorf("open the flow: the judge returned %d: %w", int32(code), err)
	}
	return benchDifference(b.judge, b.idle, benchPacket(src, dst, benchPort, policy.FlagACK))
}

// benchRun is a judge of its own, with a view in force, beside a program that does nothing.
type benchRun struct {
	coll  *ebpf.Collection
	judge *ebpf.Program
	idle  *ebpf.Program
	w     *writer
}

func newBenchHost(hook string, entries int, v *policy.View) (*benchRun, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("lift the limit on locked memory: %w", err)
	}
	coll, err := benchLoad(hook, entries, v)
	if err != nil {
		return nil, explain(err)
	}
	b := &benchRun{coll: coll, judge: coll.Programs[hook]}
	b.idle, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "idle", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		b.close()
		return nil, explain(fmt.Errorf("load the idle program: %w", err))
	}
	if b.w, err = newWriter(coll.Maps, readClock); err == nil {
		_, err = b.w.apply(v)
	}
	if err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *benchRun) close() {
	b.coll.Close()
	if b.idle != nil {
		b.idle.Close()
	}
}

// benchDifference runs the two programs in turns.
func benchDifference(judge, idle *ebpf.Program, packet []byte) (float64, error) {
	best := [2]time.Duration{time.Hour, time.Hour}
	for range benchRounds {
		for i, prog := range []*ebpf.Program{judge, idle} {
			code, took, err := prog.Benchmark(packet, benchRuns, nil)
			if err != nil {
				return 0, fmt.Errorf("run %s: %w", prog, err)
			}
			if int32(code) != -1 {
				return 0, fmt.Errorf("run %s: it returned %d", prog, int32(code))
			}
			best[i] = min(best[i], took)
		}
	}
	return float64(best[0] - best[1]), nil
}

var (
	benchLocal  = netip.MustParseAddr("198.18.0.5")
	benchRemote = netip.MustParseAddr("198.18.1.9")
)

const (
	benchOwn  identity.Number = 300
	benchPeer identity.Number = 301
	benchPort                 = 443
)

// benchLinkHeader is what the harness wants in front of a packet.
const benchLinkHeader = 14

// setLinkHeader tells the programs where packets begin; on real devices that is 0.
func setLinkHeader(spec *ebpf.CollectionSpec, n uint32) error {
	if err := spec.Variables["link_header"].Set(n); err != nil {
		return fmt.Errorf("set the length of the link header: %w", err)
	}
	return nil
}

// benchView has one rule in each direction that counts, among many that do not. cgroup is the workload's, 0 for none.
func benchView(entries int, cgroup uint64) *policy.View {
	v := &policy.View{
		Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd5a:7::/48"),
		Lease: policy.Lease{Ends: time.Now().Add(24 * time.Hour)},
		Addresses: map[netip.Addr]policy.Address{
			benchLocal:  {Number: benchOwn, Local: true},
			benchRemote: {Number: benchPeer},
		},
	}
	if cgroup != 0 {
		v.Locals = map[policy.LocalKey]identity.Number{{Cgroup: cgroup, UID: policy.AnyUID}: benchOwn}
	}
	rs := policy.Ruleset{}
	for _, dir := range []policy.Direction{policy.Ingress, policy.Egress} {
		rs[policy.Key{Peer: benchPeer, Port: benchPort, Proto: flow.TCP, Dir: dir}] = policy.Value{Allow: policy.Slot{Rule: 1}}
	}
	for i := len(rs); i < entries; i++ {
		k := policy.Key{Peer: benchPeer + identity.Number(1+i/1000), Port: uint16(1 + i%1000), Proto: flow.TCP, Dir: policy.Ingress}
		rs[k] = policy.Value{Allow: policy.Slot{Rule: uint32(i + 1)}}
	}
	v.Rulesets = map[identity.Number]policy.Ruleset{benchOwn: rs}
	return v
}

// benchLoad loads a judge of its own, with one program and room for the entries.
func benchLoad(hook string, entries int, v *policy.View) (*ebpf.Collection, error) {
	spec, err := bpf.LoadJudge()
	if err != nil {
		return nil, fmt.Errorf("read the judge's object: %w", err)
	}
	if err := setOverlay(spec, v.Overlay4, v.Overlay6); err != nil {
		return nil, err
	}
	if err := setLinkHeader(spec, benchLinkHeader); err != nil {
		return nil, err
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	spec.Maps[mapEntries].MaxEntries = uint32(max(entries, DefaultEntries))
	for name := range spec.Programs {
		if name != hook {
			delete(spec.Programs, name)
		}
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load the judge: %w", err)
	}
	return coll, nil
}

// benchPacket is a TCP segment from port 40000, behind an Ethernet header as the harness wants it. Checksums
// stay empty: the judge does not look at them.
func benchPacket(from, to netip.Addr, port uint16, flags uint8) []byte {
	const ip = 20
	b := make([]byte, 128)
	b[12], b[13] = 0x08, 0x00
	h := b[benchLinkHeader:]
	h[0], h[8], h[9] = 0x45, 64, uint8(flow.TCP)
	binary.BigEndian.PutUint16(h[2:], uint16(len(b)-benchLinkHeader))
	src, dst := from.As4(), to.As4()
	copy(h[12:], src[:])
	copy(h[16:], dst[:])
	l4 := h[ip:]
	binary.BigEndian.PutUint16(l4, 40000)
	binary.BigEndian.PutUint16(l4[2:], port)
	l4[12], l4[13] = 5<<4, flags
	return b
}
