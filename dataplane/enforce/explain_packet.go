package enforce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// dryFrame renders the packet that opens a flow, behind an Ethernet header as the harness wants it; or the call before
// it, of which an unset source is the unspecified address. Checksums stay empty: the judge does not look at them.
func dryFrame(hook policy.Hook, t flow.Tuple) []byte {
	src, dst := t.Src, t.Dst
	proto := t.Proto
	if proto.Policy() == flow.ICMP {
		proto = flow.ICMP
		if dst.Addr().Is6() {
			proto = flow.ICMPv6
		}
	}
	if !src.Addr().IsValid() {
		unset := netip.IPv4Unspecified()
		if dst.Addr().Is6() {
			unset = netip.IPv6Unspecified()
		}
		src = netip.AddrPortFrom(unset, 0)
	}
	if src.Port() == 0 && hook != policy.HookConnect {
		src = netip.AddrPortFrom(src.Addr(), anyPort)
	}
	const ether, room = 14, 20
	b := make([]byte, ether, ether+40+room)
	payload := dryTransport(hook, proto, src.Port(), dst.Port())
	if dst.Addr().Is6() {
		b[12], b[13] = 0x86, 0xdd
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, uint8(proto), 64
		binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
		s, d := src.Addr().As16(), dst.Addr().As16()
		copy(h[8:], s[:])
		copy(h[24:], d[:])
		return append(append(b, h...), payload...)
	}
	b[12], b[13] = 0x08, 0x00
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, uint8(proto)
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
	s, d := src.Addr().As4(), dst.Addr().As4()
	copy(h[12:], s[:])
	copy(h[16:], d[:])
	return append(append(b, h...), payload...)
}

// dryTransport is the header that opens a flow: a SYN, an echo request, a datagram. An echo has one identifier in place
// of the ports; the call of a ping socket has none yet.
func dryTransport(hook policy.Hook, proto flow.Proto, sport, dport uint16) []byte {
	b := make([]byte, 20)
	if proto.Policy() == flow.ICMP {
		b[0] = 8
		if proto == flow.ICMPv6 {
			b[0] = 128
		}
		if hook != policy.HookConnect {
			binary.BigEndian.PutUint16(b[4:], sport)
		}
		return b
	}
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	switch proto {
	case flow.TCP:
		b[12], b[13] = 5<<4, policy.FlagSYN
	case flow.UDP:
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	}
	return b
}

// SocketIn is a socket of a process in the cgroup at dir, with its ancestors up to the root of the hierarchy, or as far
// up as dir's mount shows them.
func SocketIn(dir string, uid uint32) (policy.Socket, error) {
	s := policy.Socket{UID: uid}
	for {
		id, err := CgroupID(dir)
		if err != nil {
			return s, fmt.Errorf("cgroups of %s: %w", dir, err)
		}
		s.Cgroups = append(s.Cgroups, id)
		parent := filepath.Dir(dir)
		if id == rootCgroup || parent == dir {
			return s, nil
		}
		if _, err := checkCgroup(parent); errors.Is(err, ErrNoCgroup) {
			return s, nil
		}
		dir = parent
	}
}

// rootCgroup is the id of the root of every hierarchy.
const rootCgroup = 1
