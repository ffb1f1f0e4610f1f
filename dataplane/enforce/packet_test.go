package enforce

import (
	"encoding/binary"
	"net/netip"
	"unsafe"
)

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

func pointer[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }

// checksum is the Internet checksum (RFC 1071).
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for i := 0; i+1 < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		if len(b)%2 == 1 {
			sum += uint32(b[len(b)-1]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// ipPacket puts an IP header of the addresses' family in front of a payload.
func ipPacket(src, dst netip.AddrPort, proto uint8, payload []byte) []byte {
	if src.Addr().Is6() {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(h[8:], s[:])
		copy(h[24:], d[:])
		return append(h, payload...)
	}
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	s, d := src.Addr().As4(), dst.Addr().As4()
	copy(h[12:], s[:])
	copy(h[16:], d[:])
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

// pseudo is the pseudo header that transport checksums cover.
func pseudo(src, dst netip.AddrPort, proto uint8, n int) []byte {
	b := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	return append(b, 0, proto, byte(n>>8), byte(n))
}

func udpHeader(src, dst netip.AddrPort, data string) []byte {
	b := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(data)))
	b = append(b, data...)
	binary.BigEndian.PutUint16(b[6:], checksum(pseudo(src, dst, protoUDP, len(b)), b))
	return b
}

func tcpHeader(src, dst netip.AddrPort, flags uint8, seq, ack uint32) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 0x50, flags
	binary.BigEndian.PutUint16(b[14:], 65535)
	binary.BigEndian.PutUint16(b[16:], checksum(pseudo(src, dst, protoTCP, len(b)), b))
	return b
}

func icmpEcho(src, dst netip.AddrPort, request bool) []byte {
	b := make([]byte, 8)
	switch {
	case src.Addr().Is4() && request:
		b[0] = 8
	case src.Addr().Is6() && request:
		b[0] = 128
	case src.Addr().Is6():
		b[0] = 129
	}
	binary.BigEndian.PutUint16(b[4:], src.Port())
	if src.Addr().Is6() {
		binary.BigEndian.PutUint16(b[2:], checksum(pseudo(src, dst, protoICMPv6, len(b)), b))
	} else {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

// icmpError quotes the beginning of a packet: destination unreachable, of either family.
func icmpError(src, dst netip.AddrPort, quoted []byte) []byte {
	b := append([]byte{3, 1, 0, 0, 0, 0, 0, 0}, quoted...)
	if src.Addr().Is6() {
		b[0], b[1] = 1, 0
		binary.BigEndian.PutUint16(b[2:], checksum(pseudo(src, dst, protoICMPv6, len(b)), b))
		return b
	}
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

// portsOf reads source and destination port of a packet without options.
func portsOf(p []byte) (src, dst uint16) {
	at := 20
	if p[0]>>4 == 6 {
		at = 40
	}
	if len(p) < at+4 {
		return 0, 0
	}
	return binary.BigEndian.Uint16(p[at:]), binary.BigEndian.Uint16(p[at+2:])
}

// sourceOf reads the source address of a packet.
func sourceOf(p []byte) netip.Addr {
	if p[0]>>4 == 6 {
		a, _ := netip.AddrFromSlice(p[8:24])
		return a
	}
	a, _ := netip.AddrFromSlice(p[12:16])
	return a
}
