package flow

import (
	"fmt"
	"net/netip"
)

// Proto is an IP protocol number (IANA). ICMPv6 is folded into ICMP wherever policy is concerned.
type Proto uint8

// The protocols that policy can name.
const (
	AnyProto Proto = 0
	ICMP     Proto = 1
	TCP      Proto = 6
	UDP      Proto = 17
	ICMPv6   Proto = 58
	SCTP     Proto = 132
)

// Policy folds ICMPv6 into ICMP: a rule that allows icmp means both.
func (p Proto) Policy() Proto {
	if p == ICMPv6 {
		return ICMP
	}
	return p
}

// String is the name in records and rules.
func (p Proto) String() string {
	switch p {
	case AnyProto:
		return "any"
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMPv6:
		return "icmpv6"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("proto-%d", uint8(p))
}

// Tuple names one conversation. For ICMP echo both ports are the echo identifier.
type Tuple struct {
	Src, Dst netip.AddrPort
	Proto    Proto
}

// Reverse is the tuple of the replies.
func (t Tuple) Reverse() Tuple { return Tuple{Src: t.Dst, Dst: t.Src, Proto: t.Proto} }

// Canonical orders the two ends so that both directions give the same tuple; swapped reports whether they changed
// places. The order is by address, then port, as in bpf/lib/ct.h.
func (t Tuple) Canonical() (c Tuple, swapped bool) {
	if t.Src.Compare(t.Dst) > 0 {
		return t.Reverse(), true
	}
	return t, false
}

// String is "tcp 198.18.0.5:40312 -> 198.18.0.9:5432".
func (t Tuple) String() string { return fmt.Sprintf("%v %v -> %v", t.Proto, t.Src, t.Dst) }
