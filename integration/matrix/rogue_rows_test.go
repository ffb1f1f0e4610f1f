package matrix

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"testing"

	"github.com/signet-overlay/signet/integration/probe/forge"
)

func hexKey(t *testing.T, text string) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	must(t, err)
	return fmt.Sprintf("%x", raw)
}

// rogueCase is something that a host with valid keys sends.
type rogueCase struct {
	name    string
	packets func(payload []byte) [][]byte
	dst     netip.AddrPort
	hook    string // where it is not the tunnel's ingress
	reasons []string
}

func one(f func(payload []byte) []byte) func([]byte) [][]byte {
	return func(payload []byte) [][]byte { return [][]byte{f(payload)} }
}

// rogueCases come from the rogue's own address, so that only the judge can refuse them.
//
//house:allow-long a table of packets
func rogueCases(l *lab, family string, own, open, shut, inside netip.AddrPort) []rogueCase {
	node := netip.AddrPortFrom(l.api.of(family), 9) // somebody else, whose packet an error pretends to answer
	cases := []rogueCase{
		{"UDP to a forbidden port", one(func(b []byte) []byte { return forge.UDPPacket(own, shut, b) }), shut, "", []string{"NO_RULE"}},
		{"TCP SYN to a forbidden port", one(func(b []byte) []byte { return forge.TCPPacket(own, shut, forge.SYN, b) }), shut, "", []string{"NO_RULE"}},
		{"UDP to another workload", one(func(b []byte) []byte { return forge.UDPPacket(own, inside, b) }), inside, "", []string{"NO_RULE"}},
		{"ACK without a connection", one(func(b []byte) []byte { return forge.TCPPacket(own, open, forge.ACK|forge.PSH, b) }), open, "", []string{"CT_INVALID"}},
		{"RST without a connection", one(func(b []byte) []byte { return forge.TCPPacket(own, open, forge.RST, b) }), open, "", []string{"CT_INVALID"}},
		{"TCP without flags", one(func(b []byte) []byte { return forge.TCPPacket(own, open, 0, b) }), open, "", []string{"MALFORMED", "CT_INVALID"}},
		{"TCP SYN+FIN", one(func(b []byte) []byte { return forge.TCPPacket(own, open, forge.SYN|forge.FIN, b) }), open, "", []string{"MALFORMED", "CT_INVALID"}},
		{"TCP SYN+RST", one(func(b []byte) []byte { return forge.TCPPacket(own, open, forge.SYN|forge.RST, b) }), open, "", []string{"MALFORMED", "CT_INVALID"}},
		{"TCP FIN+PSH+URG", one(func(b []byte) []byte { return forge.TCPPacket(own, open, forge.FIN|forge.PSH|forge.URG, b) }), open, "", []string{"MALFORMED", "CT_INVALID"}},
		{"echo reply to no request", one(func(b []byte) []byte { return forge.EchoReply(own.Addr(), open.Addr(), 9, b) }), at(open.Addr()), "", []string{"CT_INVALID"}},
		{"ICMP unreachable for another's flow", one(func(b []byte) []byte {
			return forge.Unreachable(own.Addr(), open.Addr(), forge.UDPPacket(netip.AddrPortFrom(open.Addr(), portRemote), node, b))
		}), at(open.Addr()), "", []string{"CT_INVALID"}},
		{"ICMP unreachable for no flow", one(func(b []byte) []byte {
			return forge.Unreachable(own.Addr(), open.Addr(), forge.UDPPacket(netip.AddrPortFrom(open.Addr(), 9), own, b))
		}), at(open.Addr()), "", []string{"CT_INVALID"}},
		{"fragments to a forbidden port", func(b []byte) [][]byte { return forge.Fragments(own, shut, append(b, make([]byte, 64)...), 48) }, at(shut.Addr()), "",
			[]string{"FRAGMENT", "NO_RULE"}},
		{"a later fragment alone", func(b []byte) [][]byte { return forge.Fragments(own, open, append(make([]byte, 64), b...), 48)[1:] }, at(open.Addr()), "", []string{"FRAGMENT"}},
		{"protocol 253", one(func(b []byte) []byte { return forge.IP(forge.Experiment, own.Addr(), open.Addr(), b) }), at(open.Addr()), "", []string{"UNKNOWN_PROTO"}},
		{"destination underlay", one(func(b []byte) []byte {
			return forge.UDPPacket(own, netip.AddrPortFrom(l.under.of(family), portRemote), b)
		}),
			netip.AddrPortFrom(l.under.of(family), portRemote), "", []string{"UNKNOWN_PEER"}},
	}
	if family == "v4" {
		loop := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), portRemote)
		cases = append(cases,
			rogueCase{"destination loopback", one(func(b []byte) []byte { return forge.UDPPacket(own, loop, b) }), loop, "", []string{"UNKNOWN_PEER"}},
			// To a port that it may reach, and then on to a workload that it may not: the judge of the tunnel sees the first
			// address, that of the receiving socket the second.
			rogueCase{"IP source route through the host", one(func(b []byte) []byte {
				return forge.SourceRouted(own, netip.AddrPortFrom(inside.Addr(), portEdge), open.Addr(), 0, b)
			}),
				at(inside.Addr()), "ingress", []string{"CT_INVALID", "WRONG_RECEIVER"}})
		return cases
	}
	loop := netip.AddrPortFrom(netip.IPv6Loopback(), portRemote)
	return append(cases,
		rogueCase{"destination loopback", one(func(b []byte) []byte { return forge.UDPPacket(own, loop, b) }), loop, "", []string{"UNKNOWN_PEER"}},
		rogueCase{"routing header type 0", one(func(b []byte) []byte { return forge.SourceRouted(own, inside, open.Addr(), 0, b) }), at(open.Addr()), "", []string{"MALFORMED"}},
		rogueCase{"segment routing header", one(func(b []byte) []byte { return forge.SourceRouted(own, inside, open.Addr(), 4, b) }), at(open.Addr()), "", []string{"MALFORMED"}})
}
