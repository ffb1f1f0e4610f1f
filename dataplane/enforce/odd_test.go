package enforce

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// Ends of the odd packets: a remote that may call a service of A on TCP port 8080 (see policytest).
var (
	oddFrom4 = netip.MustParseAddrPort("198.19.1.9:4000")
	oddTo4   = netip.MustParseAddrPort("198.18.0.5:8080")
	oddFrom6 = netip.MustParseAddrPort("[fd5a:7:0:1::9]:4000")
	oddTo6   = netip.MustParseAddrPort("[fd5a:7::5]:8080")
)

func oddSYN(src, dst netip.AddrPort) []byte {
	return ipPacket(src, dst, protoTCP, tcpHeader(src, dst, policy.FlagSYN, 1, 0))
}

// ether puts link header bytes and a type in front of a packet.
func ether(kind uint16, packet []byte) []byte {
	return slices.Concat(make([]byte, 12), binary.BigEndian.AppendUint16(nil, kind), packet)
}

// raw runs bytes through a program and returns what it decided.
func (k *twin) raw(t testing.TB, hook policy.Hook, frame []byte) policy.Decision {
	t.Helper()
	in := bpf.JudgeTestTestInput{Now: k.now.stamp(policytest.Now), Device: uint32(policy.DeviceOther)}
	must(t, k.coll.Maps["test_in"].Put(uint32(0), in), "set input")
	must(t, k.coll.Maps["test_out"].Put(uint32(0), bpf.JudgeTestTestOutput{}), "clear output")
	code, err := k.coll.Programs[hookPrograms[hook]].Run(&ebpf.RunOptions{Data: frame})
	must(t, err, "run")
	var out bpf.JudgeTestTestOutput
	must(t, k.coll.Maps["test_out"].Lookup(uint32(0), &out), "read output")
	d := policy.Decision{Verdict: flow.Verdict(out.Verdict), Reason: flow.Reason(out.Reason)}
	if out.Runs == 0 {
		d.Verdict = flow.Ignore // the guard passed it without a look
	}
	if pass := d.Verdict == flow.Allow || d.Verdict == flow.Ignore; pass != passes(hook, code) {
		t.Errorf("verdict %v, and the program returned %d", d.Verdict, int32(code))
	}
	return d
}

// newOddTwin has the world of the cases in force, and an empty table.
func newOddTwin(t testing.TB) *twin {
	c := policytest.Cases()[0]
	k := newTwin(t, c.View.Overlay4, c.View.Overlay6)
	k.load(t, c.View, c.Table(), c.Now)
	return k
}

// option6 is an IPv6 extension header of 8 bytes.
func option6(next uint8) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

// extend puts extension headers between the header and the rest of an IPv6 packet; kinds are those of the headers.
func extend(packet []byte, kinds ...uint8) []byte {
	out := slices.Clone(packet[:40])
	next := packet[6]
	var chain []byte
	for i, kind := range kinds {
		follower := next
		if i+1 < len(kinds) {
			follower = kinds[i+1]
		}
		if i == 0 {
			out[6] = kind
		}
		chain = append(chain, option6(follower)...)
	}
	return slices.Concat(out, chain, packet[40:])
}

// TestOddPackets is a table of packets, and longer than a function should be for that reason.
//
//house:allow-long one table of odd packets
func TestOddPackets(t *testing.T) {
	needRoot(t)
	k := newOddTwin(t)
	mapped := func(a netip.AddrPort) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
	}
	withOptions := func() []byte {
		p := oddSYN(oddFrom4, oddTo4)
		p = slices.Concat(p[:20], []byte{1, 1, 1, 0}, p[20:])
		p[0] = 0x46
		return p
	}
	change := func(p []byte, at int, to byte) []byte {
		p = slices.Clone(p)
		p[at] = to
		return p
	}
	syn4, syn6 := oddSYN(oddFrom4, oddTo4), oddSYN(oddFrom6, oddTo6)
	in, guard := policy.HookIngressDevice, policy.HookGuard
	for _, c := range []struct {
		name string
		hook policy.Hook
		data []byte
		want flow.Reason // ReasonNone: ignored
	}{
		{"plain", in, ether(0x0800, syn4), flow.PolicyAllow},
		{"plain, IPv6", in, ether(0x86dd, syn6), flow.PolicyAllow},
		{"IPv4 options", in, ether(0x0800, withOptions()), flow.PolicyAllow},
		{"header too short", in, ether(0x0800, change(syn4, 0, 0x44)), flow.Malformed},
		{"another version inside", in, ether(0x0800, change(syn4, 0, 0x65)), flow.Malformed},
		{"length below the header's", in, ether(0x0800, change(change(syn4, 2, 0), 3, 19)), flow.Malformed},
		{"TCP header too short", in, ether(0x0800, change(syn4, 32, 0x40)), flow.Malformed},
		{"TCP header too short, IPv6", in, ether(0x86dd, change(syn6, 52, 0x40)), flow.Malformed},
		{"cut in the TCP header", in, ether(0x0800, syn4[:30]), flow.Malformed},
		{"cut in the TCP header, IPv6", in, ether(0x86dd, syn6[:50]), flow.Malformed},
		{"last fragment", in, ether(0x0800, change(syn4, 7, 185)), flow.Fragment},
		{"a fragment that could rewrite the header before it", in, ether(0x0800, change(syn4, 7, 1)), flow.Malformed},
		{"do not fragment", in, ether(0x0800, change(syn4, 6, 0x40)), flow.PolicyAllow},
		{"one extension", in, ether(0x86dd, extend(syn6, 60)), flow.PolicyAllow},
		{"hop by hop, then options", in, ether(0x86dd, extend(syn6, 0, 60)), flow.PolicyAllow},
		{"five extensions", in, ether(0x86dd, extend(syn6, 60, 60, 60, 60, 60)), flow.PolicyAllow},
		{"too many extensions", in, ether(0x86dd, extend(syn6, 60, 60, 60, 60, 60, 60)), flow.Malformed},
		{"routing header", in, ether(0x86dd, extend(syn6, 43)), flow.Malformed},
		{"fragment header", in, ether(0x86dd, extend(syn6, 44)), flow.Fragment},
		{"options, then fragment", in, ether(0x86dd, extend(syn6, 60, 44)), flow.Fragment},
		{"authentication header", in, ether(0x86dd, extend(syn6, 51)), flow.UnknownProto},
		{"no next header", in, ether(0x86dd, change(syn6, 6, 59)), flow.UnknownProto},
		{"ICMPv6 in IPv4", in, ether(0x0800, change(syn4, 9, 58)), flow.UnknownProto},
		{"ICMP in IPv6", in, ether(0x86dd, change(syn6, 6, 1)), flow.UnknownProto},
		{"mapped destination in IPv6", in, ether(0x86dd, oddSYN(oddFrom6, mapped(oddTo4))), flow.Malformed},
		{"mapped source in IPv6", in, ether(0x86dd, oddSYN(mapped(oddFrom4), oddTo6)), flow.Malformed},
		{"mapped at both ends", in, ether(0x86dd, oddSYN(mapped(oddFrom4), mapped(oddTo4))), flow.UnknownPeer},
		{"ICMP timestamp", in, ether(0x0800, ipPacket(oddFrom4, oddTo4, 1, make([]byte, 20))), flow.CTInvalid},
		{"ICMP redirect", in, ether(0x0800, ipPacket(oddFrom4, oddTo4, 1, append([]byte{5, 1, 0, 0, 0, 0, 0, 0}, syn4...))), flow.CTInvalid},
		{"ICMP error without a quote", in, ether(0x0800, ipPacket(oddFrom4, oddTo4, 1, []byte{3, 1, 0, 0, 0, 0, 0, 0})), flow.Malformed},
		{"ICMPv6 error without a quote", in, ether(0x86dd, ipPacket(oddFrom6, oddTo6, 58, []byte{1, 1, 0, 0, 0, 0, 0, 0})), flow.Malformed},
		{"not IP", in, ether(0x0806, make([]byte, 28)), flow.UnknownPeer},
		{"guard: not IP", guard, ether(0x0806, make([]byte, 28)), flow.ReasonNone},
		{"guard: plain", guard, ether(0x0800, syn4), flow.NotTunnel},
		{"guard: behind a tag", guard, ether(0x8100, slices.Concat([]byte{0, 5, 0x08, 0x00}, syn4)), flow.NotTunnel},
		{"guard: behind two tags", guard, ether(0x88a8, slices.Concat([]byte{0, 5, 0x81, 0x00, 0, 6, 0x86, 0xdd}, syn6)), flow.NotTunnel},
		{"guard: underlay behind a tag", guard, ether(0x8100, slices.Concat([]byte{0, 5, 0x08, 0x00}, oddSYN(netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2")))), flow.ReasonNone},
		{"guard: malformed", guard, ether(0x0800, change(syn4, 0, 0x44)), flow.Malformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := purge(k.coll.Maps[mapConns6], func(*bpf.JudgeTuple, *bpf.JudgeConn) bool { return true })
			_, _, err4 := purge(k.coll.Maps[mapConns4], func(*bpf.JudgeTuple4, *bpf.JudgeConn) bool { return true })
			must(t, err4, "empty the table")
			must(t, err, "empty the table")
			if got := k.raw(t, c.hook, c.data); got.Reason != c.want {
				t.Errorf("got %v %v, want %v", got.Verdict, got.Reason, c.want)
			}
		})
	}
}

// TestCutPackets: a packet that is cut anywhere before its transport header is whole opens nothing.
func TestCutPackets(t *testing.T) {
	needRoot(t)
	k := newOddTwin(t)
	for _, c := range []struct {
		kind  uint16
		data  []byte
		whole int
	}{{0x0800, oddSYN(oddFrom4, oddTo4), 34}, {0x86dd, oddSYN(oddFrom6, oddTo6), 54}, {0x86dd, extend(oddSYN(oddFrom6, oddTo6), 60, 0, 60), 78}} {
		least := 20 // the harness refuses less than an IP header
		if c.kind == 0x86dd {
			least = 40
		}
		for n := least; n <= len(c.data); n++ {
			got := k.raw(t, policy.HookIngressDevice, ether(c.kind, c.data[:n]))
			if want := n >= c.whole; (got.Verdict == flow.Allow) != want {
				t.Errorf("%d of %d bytes: %v %v", n, len(c.data), got.Verdict, got.Reason)
			}
		}
	}
}

// FuzzFrame gives the programs any bytes. On a host without rules nothing but the underlay's own traffic passes, and the
// guard never takes what is not an overlay packet.
func FuzzFrame(f *testing.F) {
	if testing.Short() {
		f.Skip("runs packets through the loaded programs: left out of -short")
	}
	needRootFuzz(f)
	k := newOddTwin(f)
	v := policytest.Cases()[0].View
	v.Rulesets = nil
	_, err := k.w.apply(v)
	must(f, err, "apply")
	for _, seed := range [][]byte{oddSYN(oddFrom4, oddTo4), oddSYN(oddFrom6, oddTo6), extend(oddSYN(oddFrom6, oddTo6), 60, 0)} {
		f.Add(uint16(0x0800), seed)
		f.Add(uint16(0x86dd), seed)
	}
	f.Fuzz(func(t *testing.T, kind uint16, data []byte) {
		if len(data) > 1400 {
			return
		}
		for len(data) < 40 { // the harness refuses less than an IP header
			data = append(data, 0)
		}
		frame := ether(kind, data)
		for _, hook := range []policy.Hook{policy.HookIngressDevice, policy.HookEgressDevice} {
			if d := k.raw(t, hook, frame); d.Verdict != flow.Deny {
				t.Errorf("hook %d: %v", hook, d)
			}
		}
		for _, hook := range []policy.Hook{policy.HookEgressSocket, policy.HookIngressSocket, policy.HookLoopback, policy.HookGuard} {
			if d := k.raw(t, hook, frame); d.Verdict == flow.Allow {
				t.Errorf("hook %d: %v", hook, d)
			}
		}
	})
}

func needRootFuzz(f *testing.F) {
	f.Helper()
	if !root() {
		f.Skip("needs root to load programs into the kernel")
	}
}
