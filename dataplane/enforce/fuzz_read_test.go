package enforce

import (
	"encoding/binary"
	"net/netip"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// unnamedProto stands for what means nothing on its IP version: ICMP of the other one.
const unnamedProto flow.Proto = 255

// reader makes a Packet of bytes by what the RFCs say, and by the limits that the judge states: six extension headers
// at most with the transport's, no routing header, no fragment that could rewrite a transport header.
type reader struct {
	b    []byte
	p    policy.Packet
	part flow.Proto // of what is fragmented
}

// readPacket reads an IP packet of at least 40 bytes; part is the protocol that its fragments carry.
func readPacket(v6 bool, b []byte) (p policy.Packet, part flow.Proto) {
	r := &reader{b: b}
	if v6 {
		r.ip6()
	} else {
		r.ip4()
	}
	if r.p.Malformed {
		r.p.Quoted, r.p.EchoReq = nil, false
	}
	return r.p, r.part
}

func (r *reader) ends(src, dst netip.Addr, sport, dport uint16) {
	r.p.Tuple.Src, r.p.Tuple.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
}

func (r *reader) ports(sport, dport uint16) {
	r.ends(r.p.Tuple.Src.Addr(), r.p.Tuple.Dst.Addr(), sport, dport)
}

// ip4 reads RFC 791.
func (r *reader) ip4() {
	b := r.b
	r.ends(netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), 0, 0)
	r.p.Tuple.Proto = flow.Proto(b[9])
	header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if b[0]>>4 != 4 || header < 20 || total != 0 && total < header {
		r.p.Malformed = true
		return
	}
	place := binary.BigEndian.Uint16(b[6:])
	offset, more := int(place&0x1fff), place&0x2000 != 0
	r.part = r.p.Tuple.Proto
	if offset > 0 || more {
		r.p.Fragment = uint32(binary.BigEndian.Uint16(b[4:]))
	}
	if offset > 0 {
		r.later(offset)
		return
	}
	if more {
		r.p.Part = policy.FirstFragment
	}
	r.transport(r.p.Tuple.Proto, header, false)
}

// later is a fragment behind the first: at 8 bytes it could rewrite TCP's flags (RFC 3128), of UDP nothing.
func (r *reader) later(offset int) {
	r.p.Part = policy.LaterFragment
	r.p.Malformed = offset == 1 && r.part != flow.UDP
}

// ip6 reads RFC 8200.
func (r *reader) ip6() {
	b := r.b
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	r.ends(src, dst, 0, 0)
	r.p.Tuple.Proto = flow.Proto(b[6])
	if b[0]>>4 != 6 || src.Is4In6() || dst.Is4In6() {
		r.p.Malformed = true
		return
	}
	const hopByHop, routing, fragment, destination, limit = 0, 43, 44, 60, 5
	next, at := b[6], 40
	for headers := 0; ; headers++ {
		switch next {
		case hopByHop, destination, fragment, routing:
		default:
			r.p.Tuple.Proto = flow.Proto(next)
			if headers <= limit {
				r.transport(flow.Proto(next), at, true)
			} else {
				r.p.Malformed = true
			}
			return
		}
		if next == routing || headers > limit || at+2 > len(b) {
			r.p.Malformed = true
			return
		}
		if next != fragment {
			next, at = b[at], at+(int(b[at+1])+1)*8
			continue
		}
		if at+8 > len(b) || r.p.Part == policy.FirstFragment {
			r.p.Malformed = true
			return
		}
		place, id := binary.BigEndian.Uint16(b[at+2:]), binary.BigEndian.Uint32(b[at+4:])
		next, at = b[at], at+8
		if place>>3 > 0 {
			r.part, r.p.Fragment, r.p.Tuple.Proto = flow.Proto(next), id, flow.Proto(next)
			r.later(int(place >> 3))
			return
		}
		if place&1 != 0 {
			r.part, r.p.Fragment, r.p.Part = flow.Proto(next), id, policy.FirstFragment
		}
	}
}

// transport reads the header behind IP's.
func (r *reader) transport(proto flow.Proto, at int, v6 bool) {
	least := map[flow.Proto]int{flow.TCP: 14, flow.UDP: 8, flow.SCTP: 12, flow.ICMP: 8, flow.ICMPv6: 8}[proto]
	icmp := proto == flow.ICMP || proto == flow.ICMPv6
	switch {
	case least == 0:
		return // nothing that rules can name
	case icmp && (proto == flow.ICMPv6) != v6:
		r.p.Tuple.Proto = unnamedProto
		return
	case at+least > len(r.b):
		r.p.Malformed = true
		return
	}
	b := r.b[at:]
	if icmp {
		r.icmp(b, v6)
		return
	}
	r.ports(binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]))
	if proto == flow.TCP {
		r.p.TCPFlags, r.p.Malformed = b[13], b[12]>>4 < 5
	}
}

// The kinds of ICMP messages (RFC 792, RFC 4443).
func icmpKind(kind byte, v6 bool) (request, answer, fault bool) {
	if v6 {
		return kind == 128, kind == 129, kind >= 1 && kind <= 4
	}
	return kind == 8, kind == 0, kind == 3 || kind == 11 || kind == 12
}

// icmpOther is the port of messages that are neither echo nor about anything.
const icmpOther = 0xffff

func (r *reader) icmp(b []byte, v6 bool) {
	request, answer, fault := icmpKind(b[0], v6)
	if request || answer {
		id := binary.BigEndian.Uint16(b[4:])
		r.ports(id, id)
		r.p.EchoReq = request
		return
	}
	r.ports(0, icmpOther)
	if !fault {
		return
	}
	q, ok := quotedTuple(b[8:], v6)
	r.p.Quoted, r.p.Malformed = &q, !ok
}

// quotedTuple reads the packet in an ICMP error: its IP header and eight bytes more.
func quotedTuple(b []byte, v6 bool) (q flow.Tuple, ok bool) {
	var src, dst netip.Addr
	switch {
	case v6 && (len(b) < 48 || b[0]>>4 != 6):
		return q, false
	case v6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		if src.Is4In6() || dst.Is4In6() {
			return q, false
		}
		q.Proto, b = flow.Proto(b[6]), b[40:]
	default:
		if len(b) < 20 || b[0]>>4 != 4 || b[0]&15 < 5 || len(b) < int(b[0]&15)*4+8 {
			return q, false
		}
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		q.Proto, b = flow.Proto(b[9]), b[int(b[0]&15)*4:]
	}
	var sport, dport uint16
	switch q.Proto {
	case flow.TCP, flow.UDP, flow.SCTP:
		sport, dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	case flow.ICMP, flow.ICMPv6:
		dport = icmpOther
		if request, answer, _ := icmpKind(b[0], v6); request || answer {
			sport = binary.BigEndian.Uint16(b[4:])
			dport = sport
		}
	}
	q.Src, q.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return q, true
}
