package policytest

import (
	"maps"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// Case is one packet or call, with everything that the judge knows and what it must decide.
type Case struct {
	Name  string
	View  *policy.View
	Conns []policy.Conn // tracked before
	Full  bool          // the table holds Room connections of others already
	Quota int           // of each identity; 0 for none
	// Fragments that have passed before.
	Fragments map[policy.FragmentKey]policy.Fragment
	Packet    policy.Packet
	Now       time.Time
	Want      policy.Decision
	// Tracked is how many connections there are afterwards, not counting those of others.
	Tracked int
}

// Room is the size of the connection table in every case.
const Room = 64

// Table is the connection table before the packet.
func (c *Case) Table() *policy.Table {
	t := &policy.Table{Conns: map[flow.Tuple]policy.Conn{}, Max: Room, Quota: c.Quota, Fragments: maps.Clone(c.Fragments)}
	for _, conn := range c.Conns {
		key, _ := conn.Orig.Canonical()
		t.Conns[key] = conn
	}
	for i := 0; c.Full && len(t.Conns) < Room; i++ {
		orig := flow.Tuple{Src: netip.AddrPortFrom(a4, uint16(20000+i)), Dst: netip.AddrPortFrom(remote4, 443), Proto: flow.TCP}
		key, _ := orig.Canonical()
		t.Conns[key] = policy.Conn{Orig: orig, Rule: 1, Generation: Generation}
	}
	return t
}

// Cases is the table. Each call gives fresh values.
func Cases() []Case {
	b := &builder{}
	b.scope()
	b.form()
	b.place()
	b.lease()
	b.owner()
	b.ownEnd()
	b.calls()
	b.binds()
	b.peers()
	b.quotes()
	b.tracked()
	b.untracked()
	b.rules()
	b.rulesInTime()
	b.sameHost()
	b.full()
	b.fragments()
	b.tcpFlags()
	b.sctp()
	b.ranges()
	b.audit()
	b.traits()
	b.namespaces()
	b.quota()
	return b.cases
}

// builder collects cases.
type builder struct{ cases []Case }

// option changes a case.
type option func(*Case)

// add makes a case of a packet and what must come of it.
func (b *builder) add(name string, p policy.Packet, want policy.Decision, opts ...option) {
	c := Case{Name: name, View: world(), Packet: p, Now: Now, Want: want}
	for _, o := range opts {
		o(&c)
	}
	if c.Tracked == 0 && want.Verdict == flow.Allow && p.Hook != policy.HookConnect && p.Hook != policy.HookBind {
		c.Tracked = 1
	}
	b.cases = append(b.cases, c)
}

func with(f func(*policy.View)) option { return func(c *Case) { f(c.View) } }

func at(d time.Duration) option { return func(c *Case) { c.Now = Now.Add(d) } }

// leaves says how many connections there are afterwards; -1 for none.
func leaves(n int) option { return func(c *Case) { c.Tracked = n } }

// known tracks a connection of this generation, judged by a rule.
func known(orig flow.Tuple, rule uint32) option {
	return func(c *Case) {
		c.Conns = append(c.Conns, policy.Conn{Orig: orig, Rule: rule, Generation: Generation})
	}
}

// older tracks a connection that was judged under the generation before.
func older(orig flow.Tuple, rule uint32) option {
	return func(c *Case) {
		c.Conns = append(c.Conns, policy.Conn{Orig: orig, Rule: rule, Generation: Older})
	}
}

// due tracks a connection of this generation that is to be judged again at a distance from Now.
func due(orig flow.Tuple, rule uint32, d time.Duration) option {
	return func(c *Case) {
		c.Conns = append(c.Conns, policy.Conn{Orig: orig, Rule: rule, Generation: Generation, Expires: Now.Add(d)})
	}
}

func pass(rule uint32, src, dst identity.Number) policy.Decision {
	return policy.Decision{Verdict: flow.Allow, Reason: flow.PolicyAllow, Rule: rule, Src: src, Dst: dst}
}

func refuse(r flow.Reason, src, dst identity.Number) policy.Decision {
	return policy.Decision{Verdict: flow.Deny, Reason: r, Src: src, Dst: dst}
}

func refuseBy(r flow.Reason, rule uint32, src, dst identity.Number) policy.Decision {
	return policy.Decision{Verdict: flow.Deny, Reason: r, Rule: rule, Src: src, Dst: dst}
}

var ignored = policy.Decision{Verdict: flow.Ignore}

// tuple makes a tuple of the protocol.
func tuple(proto flow.Proto, src netip.Addr, sport uint16, dst netip.Addr, dport uint16) flow.Tuple {
	return flow.Tuple{Src: netip.AddrPortFrom(src, sport), Dst: netip.AddrPortFrom(dst, dport), Proto: proto}
}

func tcp(src netip.Addr, sport uint16, dst netip.Addr, dport uint16) flow.Tuple {
	return tuple(flow.TCP, src, sport, dst, dport)
}

func udp(src netip.Addr, sport uint16, dst netip.Addr, dport uint16) flow.Tuple {
	return tuple(flow.UDP, src, sport, dst, dport)
}

// echo is the tuple of a ping.
func echo(src, dst netip.Addr, id uint16) flow.Tuple {
	if src.Is6() {
		return tuple(flow.ICMPv6, src, id, dst, id)
	}
	return tuple(flow.ICMP, src, id, dst, id)
}

// in makes the socket of a process in a cgroup below cgSystem, run by root.
func in(cgroups ...uint64) policy.Socket { return policy.Socket{Cgroups: append(cgroups, cgSystem, 1)} }

func as(s policy.Socket, uid uint32) policy.Socket {
	s.UID = uid
	return s
}

// kernel is what the kernel itself sends.
var kernel = policy.Socket{}

// packet is a packet at a hook. TCP packets open their connection, pings ask, unless changed afterwards.
func packet(h policy.Hook, t flow.Tuple, s policy.Socket) policy.Packet {
	p := policy.Packet{Hook: h, Tuple: t, Socket: s}
	switch t.Proto {
	case flow.TCP:
		p.TCPFlags = policy.FlagSYN
	case flow.ICMP, flow.ICMPv6:
		p.EchoReq = true
	}
	switch h {
	case policy.HookGuard:
		p.Device = policy.DeviceOther
	case policy.HookLoopback:
		p.Device = policy.DeviceLoopback
	case policy.HookFromWorkload, policy.HookToWorkload:
		p.Device = policy.DeviceWorkload
	}
	return p
}

// Packets at each hook.
func leave(t flow.Tuple, s policy.Socket) policy.Packet { return packet(policy.HookEgressSocket, t, s) }
func exit(t flow.Tuple, s policy.Socket) policy.Packet  { return packet(policy.HookEgressDevice, t, s) }
func enter(t flow.Tuple) policy.Packet {
	return packet(policy.HookIngressDevice, t, policy.Socket{})
}
func reach(t flow.Tuple, s policy.Socket) policy.Packet {
	return packet(policy.HookIngressSocket, t, s)
}
func loop(t flow.Tuple, s policy.Socket) policy.Packet { return packet(policy.HookLoopback, t, s) }
func call(t flow.Tuple, s policy.Socket) policy.Packet { return packet(policy.HookConnect, t, s) }
func guard(t flow.Tuple, s policy.Socket) policy.Packet {
	return packet(policy.HookGuard, t, s)
}

func flags(p policy.Packet, f uint8) policy.Packet {
	p.TCPFlags = f
	return p
}

func reply(p policy.Packet) policy.Packet {
	p.EchoReq = false
	return p
}

func on(p policy.Packet, d policy.Device) policy.Packet {
	p.Device = d
	return p
}

func fragment(p policy.Packet) policy.Packet {
	p.Part, p.Fragment = policy.LaterFragment, 9
	return p
}

func malformed(p policy.Packet) policy.Packet {
	p.Malformed = true
	return p
}

// errorFor makes an ICMP error that quotes a packet.
func errorFor(h policy.Hook, src, dst netip.Addr, s policy.Socket, quoted flow.Tuple) policy.Packet {
	t := tuple(flow.ICMP, src, 0, dst, 0xffff)
	if src.Is6() {
		t.Proto = flow.ICMPv6
	}
	p := packet(h, t, s)
	p.EchoReq, p.Quoted = false, &quoted
	return p
}
