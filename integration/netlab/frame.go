package netlab

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Ethernet types and header sizes that classify reads.
const (
	etherHeader = 14
	etherIPv4   = 0x0800
	etherARP    = 0x0806
	etherIPv6   = 0x86dd
	ipv4Header  = 20
	ipv6Header  = 40
)

// maxExtensions bounds the walk along IPv6 extension headers; what has more is classified by the last one looked at.
const maxExtensions = 8

// Flow is what a frame is about, as far as its headers tell in the clear. The zero value of a field means that the frame
// has no such thing: an ARP frame has no addresses here, an ICMP packet and a later fragment have no ports.
type Flow struct {
	EtherType uint16
	Proto     uint8 // IP protocol: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6
	Fragment  bool  // any fragment, the first one too
	Src, Dst  netip.Addr
	SrcPort   uint16
	DstPort   uint16
	ICMPType  uint8 // of ICMP or ICMPv6
}

// String is for test messages: "udp 192.0.2.1:51820 > 192.0.2.2:51820".
func (f Flow) String() string {
	switch f.EtherType {
	case etherIPv4, etherIPv6:
	case etherARP:
		return "arp"
	default:
		return fmt.Sprintf("ethertype 0x%04x", f.EtherType)
	}
	name := fmt.Sprintf("proto %d", f.Proto)
	switch f.Proto {
	case unix.IPPROTO_TCP:
		name = "tcp"
	case unix.IPPROTO_UDP:
		name = "udp"
	case unix.IPPROTO_ICMP:
		name = "icmp"
	case unix.IPPROTO_ICMPV6:
		name = "icmp6"
	}
	if f.Fragment {
		name += " fragment"
	}
	if f.Proto == unix.IPPROTO_ICMP || f.Proto == unix.IPPROTO_ICMPV6 {
		name += fmt.Sprintf(" type %d", f.ICMPType)
	}
	if f.SrcPort == 0 && f.DstPort == 0 {
		return fmt.Sprintf("%s %s > %s", name, f.Src, f.Dst)
	}
	return fmt.Sprintf("%s %s > %s", name, netip.AddrPortFrom(f.Src, f.SrcPort), netip.AddrPortFrom(f.Dst, f.DstPort))
}

// HasPort reports whether one end of the flow is this transport port.
func (f Flow) HasPort(proto uint8, port uint16) bool {
	return f.Proto == proto && (f.SrcPort == port || f.DstPort == port)
}

// Housekeeping reports whether this is what every IP link carries: ARP, and the ICMPv6 messages that never leave a link
// (multicast listener discovery 130 to 132 and 143, neighbour discovery 133 to 137).
func (f Flow) Housekeeping() bool {
	if f.EtherType == etherARP {
		return true
	}
	return f.Proto == unix.IPPROTO_ICMPV6 && !f.Fragment && (f.ICMPType >= 130 && f.ICMPType <= 137 || f.ICMPType == 143)
}

// classify reads a frame's headers. It never fails: a frame that is cut short is classified by what there is.
func classify(frame []byte) Flow {
	if len(frame) < etherHeader {
		return Flow{}
	}
	f := Flow{EtherType: binary.BigEndian.Uint16(frame[12:])}
	switch f.EtherType {
	case etherIPv4:
		f.readIPv4(frame[etherHeader:])
	case etherIPv6:
		f.readIPv6(frame[etherHeader:])
	}
	return f
}

// classifyIP reads a packet that begins with its IP header.
func classifyIP(packet []byte) (f Flow) {
	if len(packet) == 0 {
		return f
	}
	switch packet[0] >> 4 {
	case 4:
		f.EtherType = etherIPv4
		f.readIPv4(packet)
	case 6:
		f.EtherType = etherIPv6
		f.readIPv6(packet)
	}
	return f
}

func (f *Flow) readIPv4(p []byte) {
	if len(p) < ipv4Header {
		return
	}
	size := int(p[0]&0x0f) * 4
	f.Proto = p[9]
	f.Src, f.Dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	frag := binary.BigEndian.Uint16(p[6:])
	f.Fragment = frag&0x3fff != 0
	if frag&0x1fff == 0 && size >= ipv4Header && len(p) >= size {
		f.readTransport(p[size:])
	}
}

func (f *Flow) readIPv6(p []byte) {
	if len(p) < ipv6Header {
		return
	}
	f.Src, f.Dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	next, rest := p[6], p[ipv6Header:]
	for range maxExtensions {
		f.Proto = next
		size := 0
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(rest) >= 8 {
				size = int(rest[1])*8 + 8
			}
		case unix.IPPROTO_FRAGMENT:
			f.Fragment, size = true, 8
			if len(rest) >= 8 && binary.BigEndian.Uint16(rest[2:])&0xfff8 != 0 {
				f.Proto = rest[0]
				return
			}
		default:
			f.readTransport(rest)
			return
		}
		if size == 0 || len(rest) < size {
			return
		}
		next, rest = rest[0], rest[size:]
	}
}

func (f *Flow) readTransport(p []byte) {
	switch f.Proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		if len(p) >= 4 {
			f.SrcPort, f.DstPort = binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if len(p) >= 1 {
			f.ICMPType = p[0]
		}
	}
}
