package enforce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// twin is the judge in the kernel, driven packet by packet. It is the object for tests: time and socket come from a map.
type twin struct {
	coll *ebpf.Collection
	w    *writer
	now  clock
}

// hookPrograms are the programs that judge at each hook. Calls are judged by a stand-in that takes a packet's tuple.
var hookPrograms = map[policy.Hook]string{
	policy.HookConnect:       "test_connect",
	policy.HookBind:          "test_bind",
	policy.HookEgressSocket:  "egress",
	policy.HookIngressSocket: "ingress",
	policy.HookEgressDevice:  "tunnel_egress",
	policy.HookIngressDevice: "tunnel_ingress",
	policy.HookGuard:         "guard",
	policy.HookLoopback:      "lo_egress",
	policy.HookFromWorkload:  "guard",
	policy.HookToWorkload:    "guard_egress",
}

func newTwin(t testing.TB, v4, v6 netip.Prefix) *twin {
	t.Helper()
	spec, err := bpf.LoadJudgeTest()
	must(t, err, "read object")
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	must(t, setOverlay(spec, v4, v6), "set overlay")
	must(t, setLinkHeader(spec, benchLinkHeader), "set link header")
	spec.Maps[mapConns4].MaxEntries, spec.Maps[mapConns6].MaxEntries = policytest.Room, policytest.Room
	coll, err := ebpf.NewCollection(spec)
	must(t, err, "load")
	t.Cleanup(coll.Close)
	k := &twin{coll: coll, now: clock{wall: policytest.Now, mono: int64(1000 * time.Hour)}}
	k.w, err = newWriter(coll.Maps, func() clock { return k.now })
	must(t, err, "writer")
	return k
}

// load makes a view real, and the table that goes with it. generation is the one that the table means by "now".
func (k *twin) load(t testing.TB, v *policy.View, table *policy.Table, now time.Time) {
	t.Helper()
	k.forget(t)
	k.w.view = nil
	_, err := k.w.apply(v)
	must(t, err, "apply")
	must(t, k.w.settings(func(s *bpf.JudgeSettings) { s.Quota = uint32(table.Quota) }), "set quota")
	usage := map[uint32]uint32{}
	for key, c := range table.Conns {
		row := k.conn(v, key, c, now)
		usage[row.Number[0]]++
		must(t, putConn(k.coll.Maps, tupleKey(key), row), "put connection")
	}
	for n, held := range usage {
		must(t, k.coll.Maps[mapUsage].Put(n, held), "put usage")
	}
	for key, f := range table.Fragments {
		fk := bpf.JudgeFragmentKey{Id: key.ID, Proto: uint8(key.Proto)}
		if key.Src.Is6() {
			fk.Id = key.ID<<24 | key.ID>>24 | key.ID<<8&0xff0000 | key.ID>>8&0xff00 // as it is on the wire
		}
		fk.Src.W, fk.Dst.W = words(key.Src), words(key.Dst)
		row := bpf.JudgeFragment{Until: k.now.stamp(f.Until), Sport: f.Tuple.Src.Port(), Dport: f.Tuple.Dst.Port(), Proto: uint8(f.Tuple.Proto)}
		must(t, k.coll.Maps["fragments"].Put(fk, row), "put fragment")
	}
}

// forget empties what is tracked.
func (k *twin) forget(t testing.TB) {
	t.Helper()
	_, _, err1 := purge(k.coll.Maps[mapConns4], func(*bpf.JudgeTuple4, *bpf.JudgeConn) bool { return true })
	_, _, err2 := purge(k.coll.Maps[mapConns6], func(*bpf.JudgeTuple, *bpf.JudgeConn) bool { return true })
	_, _, err3 := purge(k.coll.Maps[mapUsage], func(*uint32, *uint32) bool { return true })
	_, _, err4 := purge(k.coll.Maps["fragments"], func(*bpf.JudgeFragmentKey, *bpf.JudgeFragment) bool { return true })
	must(t, errors.Join(err1, err2, err3, err4), "empty the tables")
}

// olderGeneration stands for every generation but the one in force.
const olderGeneration = 1 << 50

func (k *twin) conn(v *policy.View, key flow.Tuple, c policy.Conn, now time.Time) bpf.JudgeConn {
	out := bpf.JudgeConn{Generation: olderGeneration, Rule: c.Rule, Deadline: ^uint32(0), Expires: uint32(k.now.stamp(c.Expires) >> bpf.ConnStep)}
	if c.Generation == v.Generation {
		out.Generation = k.w.generation
	}
	if key != c.Orig {
		out.State |= bpf.ConnSwapped
	}
	local, peer := [2]uint32{bpf.ConnLocal0, bpf.ConnLocal1}, [2]uint32{bpf.ConnPeer0, bpf.ConnPeer1}
	for i, a := range []netip.Addr{c.Orig.Src.Addr(), c.Orig.Dst.Addr()} {
		info := v.Addresses[a]
		out.Number[i] = uint32(info.Number)
		if info.Local {
			out.State |= local[i]
		}
		if !info.Revoked && info.Number != 0 && (info.NotAfter.IsZero() || now.Before(info.NotAfter)) {
			out.State |= peer[i]
		}
	}
	return out
}

// judge runs one packet through the program of its hook.
func (k *twin) judge(t testing.TB, p policy.Packet, now time.Time) policy.Decision {
	t.Helper()
	in := bpf.JudgeTestTestInput{
		Now: k.now.stamp(now), Levels: uint32(len(p.Socket.Cgroups)), Uid: p.Socket.UID, Device: uint32(p.Device),
		Ifindex: p.Interface,
	}
	if p.Connected {
		in.Connected = 1
	}
	// A socket's device is known by its number.
	if p.Device == policy.DeviceWorkload {
		in.Device = uint32(policy.DeviceOther)
	}
	for i, id := range p.Socket.Cgroups {
		in.Cgroups[len(p.Socket.Cgroups)-1-i] = id
	}
	must(t, k.coll.Maps["test_in"].Put(uint32(0), in), "set input")
	must(t, k.coll.Maps["test_out"].Put(uint32(0), bpf.JudgeTestTestOutput{}), "clear output")
	code, err := k.coll.Programs[hookPrograms[p.Hook]].Run(&ebpf.RunOptions{Data: frame(p)})
	must(t, err, "run")
	var out bpf.JudgeTestTestOutput
	must(t, k.coll.Maps["test_out"].Lookup(uint32(0), &out), "read output")
	if out.Runs != 1 {
		t.Fatalf("the program decided %d times", out.Runs)
	}
	d := policy.Decision{
		Verdict: flow.Verdict(out.Verdict), Reason: flow.Reason(out.Reason), Rule: out.Rule,
		Src: identity.Number(out.Src), Dst: identity.Number(out.Dst),
	}
	if passed := d.Verdict != flow.Deny; passed != passes(p.Hook, code) {
		t.Errorf("verdict %v, and the program returned %d", d.Verdict, int32(code))
	}
	return d
}

// passes reads a program's return code.
func passes(h policy.Hook, code uint32) bool {
	if h == policy.HookEgressSocket || h == policy.HookIngressSocket {
		return code == 1
	}
	return int32(code) == -1
}

// sameTable compares what is tracked.
func (k *twin) sameTable(t testing.TB, v *policy.View, want *policy.Table) {
	t.Helper()
	have := 0
	err := eachConn(k.coll.Maps, func(key bpf.JudgeTuple, c *bpf.JudgeConn) bool {
		have++
		f := decodeConn(key, c, k.now)
		w, ok := want.Conns[tupleOf(key)]
		switch {
		case !ok:
			t.Errorf("the kernel tracks %v, and it should not", f.Tuple)
		case f.Tuple != w.Orig || f.Rule != w.Rule || !sameStep(f.Expires, w.Expires):
			t.Errorf("the kernel tracks %v by rule %d until %v, want %v by %d until %v", f.Tuple, f.Rule, f.Expires, w.Orig, w.Rule, w.Expires)
		case (f.Generation == k.w.generation) != (w.Generation == v.Generation):
			t.Errorf("%v: the kernel has generation %d of %d, want %d of %d", f.Tuple, f.Generation, k.w.generation, w.Generation, v.Generation)
		}
		return true
	})
	must(t, err, "read table")
	if have != len(want.Conns) {
		t.Errorf("the kernel tracks %d connections, want %d", have, len(want.Conns))
	}
}

// sameStep: the kernel judges again up to one step early.
func sameStep(have, want time.Time) bool {
	if have.IsZero() || want.IsZero() {
		return have.IsZero() && want.IsZero()
	}
	early := want.Sub(have)
	return early >= 0 && early < 1<<bpf.ConnStep
}

// TestTable runs the one table of cases through the programs. Each packet is judged three times, by the twin too: the
// second and third time what is tracked takes the fast path.
func TestTable(t *testing.T) {
	needRoot(t)
	cases := policytest.Cases()
	k := newTwin(t, cases[0].View.Overlay4, cases[0].View.Overlay6)
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			table := c.Table()
			k.load(t, c.View, table, c.Now)
			for run := range 3 {
				want := policy.Judge(c.View, table, c.Packet, c.Now)
				if run == 0 && want != c.Want {
					t.Fatalf("the judge in Go: got %+v, want %+v", want, c.Want)
				}
				if got := k.judge(t, c.Packet, c.Now); got != want {
					t.Errorf("run %d: got %+v, want %+v", run, got, want)
				}
				k.sameTable(t, c.View, table)
			}
		})
	}
}

// frame renders a packet as bytes, behind an Ethernet header as the harness wants it.
func frame(p policy.Packet) []byte {
	src, dst := p.Tuple.Src, p.Tuple.Dst
	src, dst = sameFamily(src, dst), sameFamily(dst, src)
	proto, payload := uint8(p.Tuple.Proto), transport(p, src, dst)
	if p.Hook == policy.HookConnect && proto != protoTCP && proto != protoUDP {
		payload = slices.Concat(payload, make([]byte, 20))
	}
	packet := ipPacket(src, dst, proto, payload)
	v6 := packet[0]>>4 == 6
	switch {
	case p.Part != policy.Whole && v6:
		packet[6] = 44
		place := uint16(1)
		if p.Part == policy.LaterFragment {
			place = 185<<3 | 1
		}
		ext := binary.BigEndian.AppendUint16([]byte{proto, 0}, place)
		packet = slices.Concat(packet[:40], binary.BigEndian.AppendUint32(ext, p.Fragment), packet[40:])
	case p.Part != policy.Whole:
		binary.BigEndian.PutUint16(packet[4:], uint16(p.Fragment))
		packet[6] = 0x20
		if p.Part == policy.LaterFragment {
			packet[7] = 185
		}
	case p.Malformed && v6:
		packet[6] = 43
		packet = slices.Concat(packet[:40], []byte{proto, 0, 4, 0, 0, 0, 0, 0}, packet[40:])
	case p.Malformed:
		packet[0] = 0x44
	}
	ether := make([]byte, 14, 14+len(packet))
	ether[12], ether[13] = 0x08, 0x00
	if v6 {
		ether[12], ether[13] = 0x86, 0xdd
	}
	return append(ether, packet...)
}

// sameFamily gives an address that is not there the unspecified one of its partner's family.
func sameFamily(a, other netip.AddrPort) netip.AddrPort {
	switch {
	case a.Addr().IsValid():
		return a
	case other.Addr().Is6():
		return netip.AddrPortFrom(netip.IPv6Unspecified(), a.Port())
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port())
}

func transport(p policy.Packet, src, dst netip.AddrPort) []byte {
	switch {
	case p.Quoted != nil:
		q := *p.Quoted
		inner := transport(policy.Packet{Tuple: q, EchoReq: true, TCPFlags: policy.FlagACK}, q.Src, q.Dst)
		return icmpError(src, dst, ipPacket(q.Src, q.Dst, uint8(q.Proto), inner))
	case p.Tuple.Proto == flow.TCP:
		return tcpHeader(src, dst, p.TCPFlags, 1, 1)
	case p.Tuple.Proto == flow.UDP:
		return udpHeader(src, dst, "data")
	case p.Tuple.Proto == flow.ICMP, p.Tuple.Proto == flow.ICMPv6:
		return icmpEcho(src, dst, p.EchoReq)
	}
	rest := binary.BigEndian.AppendUint16(nil, src.Port())
	return append(binary.BigEndian.AppendUint16(rest, dst.Port()), make([]byte, 8)...)
}

var _ = fmt.Sprint
