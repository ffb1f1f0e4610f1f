// Package forge makes IP packets byte by byte, with whatever addresses, flags and headers an attacker likes. It owns no
// socket: what sends its packets is integration/probe.
//
// Packets are whole, from the IP header on, and have right checksums, so that nothing but the judge has a reason to drop
// them. Lengths are not bounded here; callers stay below 64 KiB.
package forge

import (
	"encoding/binary"
	"net/netip"
)

// IP protocol numbers (IANA) that packets are made with.
const (
	ICMP     = 1
	TCP      = 6
	UDP      = 17
	Routing  = 43
	Fragment = 44
	ICMPv6   = 58
	// Experiment is for experimentation (RFC 3692): a protocol that no rule can name.
	Experiment = 253
)

// TCP flags (RFC 9293, section 3.1).
const (
	FIN = 0x01
	SYN = 0x02
	RST = 0x04
	PSH = 0x08
	ACK = 0x10
	URG = 0x20
)

// Sizes of headers without options, in bytes.
const (
	header4 = 20
	header6 = 40
	chunk   = 8 // fragment offsets and IPv6 extension headers are counted in these
)

// IP puts the header of the addresses' family before a payload.
func IP(proto byte, src, dst netip.Addr, payload []byte) []byte {
	if src.Is4() {
		return IPv4(proto, src, dst, nil, 0, payload)
	}
	return IPv6(proto, src, dst, payload)
}

// IPv4 is a header (RFC 791) with options, padded by the caller to a multiple of four bytes, and with the fragment word:
// three flags and the offset in eight bytes.
func IPv4(proto byte, src, dst netip.Addr, options []byte, fragment uint16, payload []byte) []byte {
	size := header4 + len(options)
	p := make([]byte, size, size+len(payload))
	p[0], p[8], p[9] = 4<<4|byte(size/4), 64, proto
	binary.BigEndian.PutUint16(p[2:], uint16(size+len(payload)))
	binary.BigEndian.PutUint16(p[4:], 0x5167) // one identification: fragments of one packet belong together
	binary.BigEndian.PutUint16(p[6:], fragment)
	copy(p[12:16], src.AsSlice())
	copy(p[16:20], dst.AsSlice())
	copy(p[header4:], options)
	binary.BigEndian.PutUint16(p[10:], ^fold(sum(p)))
	return append(p, payload...)
}

// IPv6 is a header (RFC 8200); next names what the payload begins with, which may be an extension header.
func IPv6(next byte, src, dst netip.Addr, payload []byte) []byte {
	p := make([]byte, header6, header6+len(payload))
	p[0], p[6], p[7] = 6<<4, next, 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
	copy(p[8:24], src.AsSlice())
	copy(p[24:40], dst.AsSlice())
	return append(p, payload...)
}

// UDPPacket is a whole packet with a datagram in it.
func UDPPacket(src, dst netip.AddrPort, payload []byte) []byte {
	return IP(UDP, src.Addr(), dst.Addr(), Datagram(src, dst, payload))
}

// Datagram is a UDP header (RFC 768) and its payload.
func Datagram(src, dst netip.AddrPort, payload []byte) []byte {
	u := append(make([]byte, 8), payload...)
	binary.BigEndian.PutUint16(u[0:], src.Port())
	binary.BigEndian.PutUint16(u[2:], dst.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	binary.BigEndian.PutUint16(u[6:], ^fold(sum(u)+pseudo(UDP, src.Addr(), dst.Addr(), len(u))))
	return u
}

// TCPPacket is a whole packet with a segment (RFC 9293) of those flags in it.
func TCPPacket(src, dst netip.AddrPort, flags byte, payload []byte) []byte {
	t := append(make([]byte, 20), payload...)
	binary.BigEndian.PutUint16(t[0:], src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint32(t[4:], 0x51676e65)
	t[12], t[13] = 5<<4, flags
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	binary.BigEndian.PutUint16(t[16:], ^fold(sum(t)+pseudo(TCP, src.Addr(), dst.Addr(), len(t))))
	return IP(TCP, src.Addr(), dst.Addr(), t)
}

// EchoReply answers an echo request that nobody made (RFC 792, RFC 4443).
func EchoReply(src, dst netip.Addr, id uint16, payload []byte) []byte {
	return echo(src, dst, 0, 129, id, payload)
}

// EchoRequest is a ping.
func EchoRequest(src, dst netip.Addr, id uint16, payload []byte) []byte {
	return echo(src, dst, 8, 128, id, payload)
}

func echo(src, dst netip.Addr, type4, type6 byte, id uint16, payload []byte) []byte {
	body := append(make([]byte, 4), payload...)
	binary.BigEndian.PutUint16(body, id)
	if src.Is4() {
		return icmp(src, dst, type4, 0, body)
	}
	return icmp(src, dst, type6, 0, body)
}

// Unreachable is an ICMP error, port unreachable, that quotes a packet.
func Unreachable(src, dst netip.Addr, quoted []byte) []byte {
	body := append(make([]byte, 4), quoted...)
	if src.Is4() {
		return icmp(src, dst, 3, 3, body)
	}
	return icmp(src, dst, 1, 4, body)
}

func icmp(src, dst netip.Addr, kind, code byte, body []byte) []byte {
	m := append([]byte{kind, code, 0, 0}, body...)
	if src.Is4() {
		binary.BigEndian.PutUint16(m[2:], ^fold(sum(m)))
		return IP(ICMP, src, dst, m)
	}
	binary.BigEndian.PutUint16(m[2:], ^fold(sum(m)+pseudo(ICMPv6, src, dst, len(m))))
	return IP(ICMPv6, src, dst, m)
}

// Fragments cuts a UDP packet in two: first is where the second one begins, in bytes of the datagram, a multiple of
// eight.
func Fragments(src, dst netip.AddrPort, payload []byte, first int) [][]byte {
	u := Datagram(src, dst, payload)
	if src.Addr().Is4() {
		const more = 1 << 13
		return [][]byte{
			IPv4(UDP, src.Addr(), dst.Addr(), nil, more, u[:first]),
			IPv4(UDP, src.Addr(), dst.Addr(), nil, uint16(first/chunk), u[first:]),
		}
	}
	part := func(offset int, more uint16, data []byte) []byte {
		h := make([]byte, chunk) // RFC 8200, section 4.5
		h[0] = UDP
		binary.BigEndian.PutUint16(h[2:], uint16(offset)|more)
		binary.BigEndian.PutUint32(h[4:], 0x5167)
		return IPv6(Fragment, src.Addr(), dst.Addr(), append(h, data...))
	}
	return [][]byte{part(0, 1, u[:first]), part(first, 0, u[first:])}
}

// LooseRoute is the IPv4 option that makes each hop send a packet on to the next address (RFC 791), padded.
func LooseRoute(next netip.Addr) []byte {
	a := next.As4()
	return append([]byte{1, 131, 7, 4}, a[:]...) // a no-operation first, so that the length is right
}

// SourceRouted is a UDP packet that goes to via first and is asked to go on to dst from there: by a loose source route,
// or by an IPv6 routing header of that type (RFC 8200, section 4.4; 4 is segment routing, RFC 8754).
func SourceRouted(src, dst netip.AddrPort, via netip.Addr, kind byte, payload []byte) []byte {
	u := Datagram(src, dst, payload)
	if src.Addr().Is4() {
		return IPv4(UDP, src.Addr(), via, LooseRoute(dst.Addr()), 0, u)
	}
	final := dst.Addr().As16()
	var h []byte
	if kind == 4 {
		first := via.As16()
		h = append([]byte{UDP, 4, kind, 1, 1, 0, 0, 0}, final[:]...) // the segments stand in reverse
		h = append(h, first[:]...)
	} else {
		h = append([]byte{UDP, 2, kind, 1, 0, 0, 0, 0}, final[:]...)
	}
	return IPv6(Routing, src.Addr(), via, append(h, u...))
}

// sum, fold and pseudo are the Internet checksum (RFC 1071) and its pseudo header.
func sum(b []byte) (s uint32) {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func pseudo(proto byte, src, dst netip.Addr, n int) uint32 {
	return sum(src.AsSlice()) + sum(dst.AsSlice()) + uint32(proto) + uint32(n)
}
