// Package policytest is the one table of cases for the judge. It runs against policy.Judge (internal/policy) and,
// through BPF_PROG_TEST_RUN, against the programs in the kernel (dataplane/enforce), so that the two mean the same.
//
// Start at cases.go; world.go is the host that the cases happen on.
package policytest

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// Now is when the cases happen, unless a case says otherwise.
var Now = time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)

// Generation is that of the view of every case; connections of an older one carry Older.
const (
	Generation uint64 = 7
	Older      uint64 = 6
)

// The identities of the world.
const (
	A       identity.Number = 300 // on this host
	B       identity.Number = 301 // on this host
	Node    identity.Number = 299 // this host itself
	Remote  identity.Number = 900
	Gone    identity.Number = 901 // revoked
	Stale   identity.Number = 902 // its Binding has ended
	Brief   identity.Number = 903 // its Binding ends in a minute
	Broad   identity.Number = 910 // allowed everything, with exceptions
	Windows identity.Number = 911 // allowed at times
)

// The cgroups of the world. The root is 1.
const (
	cgA         = 100
	cgB         = 200
	cgShared    = 400 // A for user 1000, B for user 1001
	cgOuter     = 500 // A
	cgInner     = 510 // B, below cgOuter
	cgBoth      = 600 // A for everybody, B for user 7
	cgSame      = 700 // A, below cgA
	cgNobody    = 800
	cgSystem    = 50 // parent of most
	userOne     = 1000
	userTwo     = 1001
	userNeither = 1002
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// The addresses of the world.
var (
	overlay4 = netip.MustParsePrefix("198.18.0.0/15")
	overlay6 = netip.MustParsePrefix("fd5a:7::/48")

	a4, a6             = ip("198.18.0.5"), ip("fd5a:7::5")
	b4, b6             = ip("198.18.0.6"), ip("fd5a:7::6")
	node4              = ip("198.18.0.1")
	remote4, remote6   = ip("198.19.1.9"), ip("fd5a:7:0:1::9")
	gone4, gone6       = ip("198.19.1.10"), ip("fd5a:7:0:1::10")
	stale4             = ip("198.19.1.11")
	brief4             = ip("198.19.1.12")
	broad4, broad6     = ip("198.19.1.20"), ip("fd5a:7:0:1::20")
	windows4           = ip("198.19.1.21")
	unknown4, unknown6 = ip("198.19.255.255"), ip("fd5a:7:0:ffff::1")
	outside4, outside6 = ip("198.20.0.1"), ip("fd5b:7::1") // one beyond the overlay's ranges
	lan4, lan6         = ip("10.0.0.7"), ip("2001:db8::7")
)

// minute is a distance in time.
const minute = time.Minute

// world is the view of every case; cases change a copy of their own.
func world() *policy.View {
	return &policy.View{
		Overlay4: overlay4, Overlay6: overlay6, Generation: Generation, Revision: 40,
		Lease: policy.Lease{Ends: Now.Add(time.Hour), Mode: policy.LeaseDenyAll},
		Addresses: map[netip.Addr]policy.Address{
			a4: {Number: A, Local: true}, a6: {Number: A, Local: true},
			b4: {Number: B, Local: true}, b6: {Number: B, Local: true},
			node4:   {Number: Node, Local: true},
			remote4: {Number: Remote}, remote6: {Number: Remote},
			gone4: {Number: Gone, Revoked: true}, gone6: {Number: Gone, Revoked: true},
			stale4: {Number: Stale, NotAfter: Now.Add(-minute)},
			brief4: {Number: Brief, NotAfter: Now.Add(minute)},
			broad4: {Number: Broad}, broad6: {Number: Broad},
			windows4: {Number: Windows},
		},
		Locals: map[policy.LocalKey]identity.Number{
			{Cgroup: cgA, UID: policy.AnyUID}:     A,
			{Cgroup: cgB, UID: policy.AnyUID}:     B,
			{Cgroup: cgShared, UID: userOne}:      A,
			{Cgroup: cgShared, UID: userTwo}:      B,
			{Cgroup: cgOuter, UID: policy.AnyUID}: A,
			{Cgroup: cgInner, UID: policy.AnyUID}: B,
			{Cgroup: cgBoth, UID: policy.AnyUID}:  A,
			{Cgroup: cgBoth, UID: 7}:              B,
			{Cgroup: cgSame, UID: policy.AnyUID}:  A,
		},
		Rulesets: map[identity.Number]policy.Ruleset{A: rulesA(), B: rulesB()},
	}
}

func allow(rule uint32) policy.Value { return policy.Value{Allow: policy.Slot{Rule: rule}} }
func deny(rule uint32) policy.Value  { return policy.Value{Deny: policy.Slot{Rule: rule}} }

// during is a slot that counts from one distance to another from Now; 0 bounds nothing.
func during(rule uint32, from, to time.Duration) policy.Slot {
	s := policy.Slot{Rule: rule}
	if from != 0 {
		s.NotBefore = Now.Add(from)
	}
	if to != 0 {
		s.NotAfter = Now.Add(to)
	}
	return s
}

func egress(peer identity.Number, proto flow.Proto, port uint16) policy.Key {
	return policy.Key{Peer: peer, Proto: proto, Port: port, Dir: policy.Egress}
}

func ingress(peer identity.Number, proto flow.Proto, port uint16) policy.Key {
	return policy.Key{Peer: peer, Proto: proto, Port: port, Dir: policy.Ingress}
}

func rulesA() policy.Ruleset {
	rs := policy.Ruleset{
		egress(Remote, flow.TCP, 443):   allow(1),
		egress(Remote, flow.UDP, 53):    allow(2),
		egress(Remote, flow.ICMP, 0):    allow(3),
		egress(Remote, flow.TCP, 65535): allow(4),
		egress(Remote, flow.TCP, 1):     allow(5),
		egress(Gone, flow.AnyProto, 0):  allow(6),
		egress(Stale, flow.AnyProto, 0): allow(7),
		egress(Brief, flow.AnyProto, 0): allow(8),
		egress(A, flow.TCP, 80):         allow(9), // itself
		egress(B, flow.TCP, 80):         allow(10),
		egress(B, flow.UDP, 80):         allow(10),
		egress(B, flow.ICMP, 0):         allow(10),
		egress(B, flow.TCP, 81):         allow(12), // B does not take it
		egress(B, flow.TCP, 84):         allow(15), // B denies it
		egress(Node, flow.TCP, 80):      allow(17), // the node has no ruleset

		// Everything, but not this; and a deny that a narrower allow does not break.
		egress(Broad, flow.AnyProto, 0): allow(30),
		egress(Broad, flow.TCP, 22):     deny(31),
		egress(Broad, flow.UDP, 0):      deny(32),
		egress(Broad, flow.UDP, 53):     allow(33),
		egress(Broad, flow.TCP, 0):      allow(34),
		egress(Broad, flow.TCP, 443):    allow(35),

		ingress(A, flow.TCP, 80):         allow(9),
		ingress(Remote, flow.TCP, 8080):  allow(40),
		ingress(Remote, flow.UDP, 5000):  allow(41),
		ingress(Remote, flow.ICMP, 0):    allow(42),
		ingress(Remote, flow.TCP, 65535): allow(43),
		ingress(Brief, flow.TCP, 8080):   allow(44),
		ingress(Remote, flow.TCP, 9090):  deny(45),
		ingress(Gone, flow.AnyProto, 0):  allow(46),
		ingress(Stale, flow.AnyProto, 0): allow(47),
	}
	for port, v := range windows() {
		rs[egress(Windows, flow.TCP, port)] = v
	}
	// Port 90 of Windows is closed now, and every port is open in general: the general rule counts.
	rs[egress(Windows, flow.TCP, 90)] = policy.Value{Allow: during(70, minute, 0)}
	rs[egress(Windows, flow.UDP, 90)] = policy.Value{Allow: during(71, 0, -minute)}
	rs[egress(Windows, flow.UDP, 0)] = policy.Value{Allow: during(72, 0, 2*minute)}
	return rs
}

// windows gives ports that are open at times.
func windows() map[uint16]policy.Value {
	return map[uint16]policy.Value{
		1: {Allow: during(51, minute, 0)},                                       // later
		2: {Allow: during(52, 0, -minute)},                                      // over
		3: {Allow: during(53, -minute, minute)},                                 // now
		4: {Allow: policy.Slot{Rule: 54}, Deny: during(64, 0, -minute)},         // the deny is over
		5: {Allow: policy.Slot{Rule: 55}, Deny: during(65, -minute, minute)},    // denied now
		6: {Allow: policy.Slot{Rule: 56, NotBefore: Now}},                       // from this instant
		7: {Allow: policy.Slot{Rule: 57, NotAfter: Now}},                        // up to this instant
		8: {Allow: policy.Slot{Rule: 58}, Deny: during(68, minute, 2*minute)},   // denied in a minute
		9: {Allow: during(59, -minute, minute), Deny: during(69, 0, -2*minute)}, // two ends, one past
	}
}

func rulesB() policy.Ruleset {
	return policy.Ruleset{
		ingress(A, flow.TCP, 80): allow(11),
		ingress(A, flow.UDP, 80): allow(11),
		ingress(A, flow.ICMP, 0): allow(11),
		ingress(A, flow.TCP, 82): allow(13), // A does not send it
		ingress(A, flow.TCP, 84): deny(16),
	}
}
