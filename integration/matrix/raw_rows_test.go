package matrix

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/probe/forge"
)

// rawPort is the source port of forged packets.
const rawPort = 41000

// packetsOf makes a row's packets.
type packetsOf func(ln lane, src netip.AddrPort, token string) [][]byte

func forgedUDP(ln lane, src netip.AddrPort, token string) [][]byte {
	return [][]byte{forge.UDPPacket(src, ln.dst, []byte(token))}
}

func forgedSYN(ln lane, src netip.AddrPort, token string) [][]byte {
	return [][]byte{forge.TCPPacket(src, ln.dst, forge.SYN, []byte(token))}
}

// rawRow is a row whose packets bring their own header, by a raw socket or by a packet socket on the lane's device.
func (ln lane) rawRow(name string, by attacker, kind, hook string, f packetsOf, reasons ...string) *row {
	src := netip.AddrPortFrom(ln.src, rawPort)
	r := ln.row(name, by, hook, reasons...)
	r.src = src
	spec := func(token string) attack.Spec {
		return attack.Spec{Kind: kind, Device: ln.device, Packets: f(ln, src, token)}
	}
	r.make = func(token string) attack.Spec {
		s := spec(token)
		s.Drop = by.drop
		return s
	}
	r.control = spec
	if kind == attack.Raw {
		r.step = "send EPERM"
	}
	return r
}

// rawRows forge whole packets by raw sockets.
func (l *lab) rawRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6") {
		for _, by := range []attacker{root, workload} {
			out = append(out, ln.rawRow("raw UDP with its own header", by, attack.Raw, "egress", forgedUDP, by.reason),
				ln.rawRow("raw TCP SYN with its own header", by, attack.Raw, "egress", forgedSYN, by.reason))
		}
		r := ln.rawRow("raw UDP with its own header", nobody, attack.Raw, "kernel: CAP_NET_RAW", forgedUDP)
		r.step, r.refusal, r.control = "socket EPERM", unrecorded, nil
		out = append(out, r)
		foreign := ln.rawRow("raw UDP from a foreign address", ln.self(), attack.Raw, "egress", func(ln lane, src netip.AddrPort, token string) [][]byte {
			return forgedUDP(ln, netip.AddrPortFrom(ln.foreign, rawPort), token)
		}, "SPOOFED_SOURCE")
		foreign.src, foreign.control = netip.AddrPortFrom(ln.foreign, rawPort), nil
		unnamed := ln.rawRow("raw protocol 253", ln.self(), attack.Raw, "egress", func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.IP(forge.Experiment, src.Addr(), ln.dst.Addr(), []byte(token))}
		}, "UNKNOWN_PROTO")
		unnamed.src, unnamed.dst, unnamed.control = at(ln.src), at(ln.dst.Addr()), nil
		out = append(out, foreign, unnamed)
	}
	return out
}

// packetRows forge packets below IP, on the device itself.
func (l *lab) packetRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6") {
		for _, by := range []attacker{root, workload} {
			for name, f := range map[string]packetsOf{"AF_PACKET, UDP": forgedUDP, "AF_PACKET, TCP SYN": forgedSYN} {
				r := ln.rawRow(name, by, attack.Packet, ln.below, f, by.reason)
				if ln.path == "lo" {
					r.control = nil // not even the owner opens a connection below its sockets: see the next row
				}
				out = append(out, r)
			}
		}
		if ln.path == "lo" {
			r := ln.rawRow("AF_PACKET, UDP", ln.self(), attack.Packet, ln.below, func(ln lane, src netip.AddrPort, token string) [][]byte {
				return forgedUDP(ln, netip.AddrPortFrom(ln.src, rawPort+1), token)
			}, "CT_INVALID")
			r.src, r.control = netip.AddrPortFrom(ln.src, rawPort+1), nil
			out = append(out, r)
		}
	}
	return out
}

// Protocols that frames claim to be of (IEEE 802 local experiment 1, and a VLAN tag).
const (
	claimOdd = 0x88b5
	claimTag = 0x8100
)

// otherVersion is the protocol that packets of the lane's family are not.
func (ln lane) otherVersion() uint16 {
	if ln.family == "v6" {
		return unix.ETH_P_IP
	}
	return unix.ETH_P_IPV6
}

// frameRows lie to the kernel about what a frame holds: on the way out it believes the sender, on the way in it reads the
// frame. The tuple is that of a tracked flow, which lacks nothing else to be delivered.
func (l *lab) frameRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6") {
		for _, by := range []attacker{root, workload} {
			for _, c := range []struct {
				name  string
				claim uint16
				tags  int
			}{{"AF_PACKET frame that claims another protocol", claimOdd, 0}, {"AF_PACKET frame that claims the other IP version", ln.otherVersion(), 0},
				{"AF_PACKET frame behind a VLAN tag", claimTag, 1}, {"AF_PACKET frame behind five VLAN tags", claimTag, 5},
				{"AF_PACKET frame behind twelve VLAN tags", claimTag, 12}} {
				// Nothing honest sends such a frame; on the tunnel, what is not IP is no peer's.
				reasons := []string{"MALFORMED"}
				if ln.path == "tunnel" {
					reasons = []string{"UNKNOWN_PEER", "MALFORMED"}
				}
				r := ln.rawRow(c.name, by, attack.Packet, ln.below, forgedUDP, reasons...)
				r.src, r.dst, r.control = at(ln.src), at(ln.dst.Addr()), nil
				if ln.path == "tunnel" || c.tags > 8 { // nobody looks that deep, so the record has no addresses
					r.src, r.dst = netip.AddrPort{}, netip.AddrPort{}
				}
				r.make = func(token string) attack.Spec {
					return attack.Spec{Kind: attack.Packet, Device: ln.device, Frame: ln.path == "lo", MAC: make([]byte, 6), Claim: c.claim, Tags: c.tags, Drop: by.drop,
						Packets: forgedUDP(ln, netip.AddrPortFrom(ln.src, rawPort), token)}
				}
				out = append(out, r)
			}
			if ln.path == "tunnel" {
				through := ln
				through.device, through.below = "lo", "lo_egress"
				r := through.rawRow("AF_PACKET on lo, to be forwarded", by, attack.Packet, through.below, forgedUDP, by.reason)
				r.control = nil
				out = append(out, r)
			}
		}
	}
	return out
}

// kernelRows forge what the kernel makes by itself, which needs no socket: it passes only for a tracked flow.
func (l *lab) kernelRows() []*row {
	var out []*row
	kinds := []struct {
		name string
		f    packetsOf
	}{
		{"reset", func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.TCPPacket(src, ln.dst, forge.RST|forge.ACK, []byte(token))}
		}},
		{"ACK without a connection", func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.TCPPacket(src, ln.dst, forge.ACK|forge.PSH, []byte(token))}
		}},
		{"echo reply", func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.EchoReply(src.Addr(), ln.dst.Addr(), 0x5167, []byte(token))}
		}},
		{"ICMP unreachable", func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.Unreachable(src.Addr(), ln.dst.Addr(), forge.UDPPacket(netip.AddrPortFrom(ln.dst.Addr(), 9), src, []byte(token)))}
		}},
	}
	for _, ln := range l.lanes("v4", "v6") {
		for _, k := range kinds {
			for _, by := range []attacker{root, workload, ln.self()} {
				reason := by.reason
				if by.name == "owner" {
					reason = "CT_INVALID" // the address is its own, but nothing asked for an answer
				}
				for kind, hook := range map[string]string{attack.Raw: "egress", attack.Packet: ln.below} {
					r := ln.rawRow("forged "+k.name+", "+kind+" socket", by, kind, hook, func(ln lane, src netip.AddrPort, token string) [][]byte {
						return k.f(ln, netip.AddrPortFrom(src.Addr(), rawPort+2), token)
					}, reason)
					r.src, r.dst, r.control = at(ln.src), at(ln.dst.Addr()), nil
					out = append(out, r)
				}
			}
		}
		// A packet of nobody's flow may still not end somebody's: the tuple is that of a tracked connection.
		for _, by := range []attacker{root, workload} {
			out = append(out, ln.rawRow("reset into a live connection", by, attack.Raw, "egress", func(ln lane, src netip.AddrPort, token string) [][]byte {
				return [][]byte{forge.TCPPacket(src, ln.dst, forge.RST, []byte(token))}
			}, by.reason))
			out[len(out)-1].control = nil
		}
	}
	return out
}

// fragmentRows forge datagrams in pieces: the first decides, and the rest follow it or are dropped.
func (l *lab) fragmentRows() []*row {
	var out []*row
	whole := func(ln lane, src netip.AddrPort, token string) [][]byte {
		return forge.Fragments(src, ln.dst, append([]byte(token), make([]byte, 64)...), 48)
	}
	second := func(ln lane, src netip.AddrPort, token string) [][]byte {
		return forge.Fragments(src, ln.dst, append(make([]byte, 64), token...), 48)[1:]
	}
	for _, ln := range l.lanes("v4", "v6") {
		for _, by := range []attacker{root, workload} {
			for kind, hook := range map[string]string{attack.Raw: "egress", attack.Packet: ln.below} {
				both := ln.rawRow("fragments, "+kind+" socket", by, kind, hook, whole, "FRAGMENT", by.reason)
				later := ln.rawRow("a later fragment alone, "+kind+" socket", by, kind, hook, second, "FRAGMENT", by.reason)
				for _, r := range []*row{both, later} {
					r.src, r.dst, r.control = at(ln.src), at(ln.dst.Addr()), nil
				}
				out = append(out, both, later)
			}
		}
	}
	return out
}

// routeRows make a packet choose a second destination behind the judge's back.
func (l *lab) routeRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6") {
		via := l.backup.of(ln.family)
		if ln.path == "lo" {
			via = ln.other
		}
		kinds := map[string]byte{"IP source route": 0}
		if ln.family == "v6" {
			kinds = map[string]byte{"routing header type 0": 0, "segment routing header": 4}
		}
		for name, kind := range kinds {
			for _, by := range []attacker{root, workload, ln.self()} {
				for socket, hook := range map[string]string{attack.Raw: "egress", attack.Packet: ln.below} {
					reason := "MALFORMED" // no packet with a routing header is judged further
					if ln.family == "v4" {
						reason = by.reason
					}
					if ln.family == "v4" && by.name == "owner" {
						reason = "UNKNOWN_PEER" // the address that it goes to next is what is judged
						if ln.path == "lo" {
							reason = "NO_RULE"
						}
					}
					r := ln.rawRow(name+", "+socket+" socket", by, socket, hook, func(ln lane, src netip.AddrPort, token string) [][]byte {
						return [][]byte{forge.SourceRouted(netip.AddrPortFrom(src.Addr(), rawPort+3), ln.dst, via, kind, []byte(token))}
					}, reason)
					if ln.family == "v4" && by.name == "owner" && ln.path == "lo" && socket == attack.Packet {
						r.reasons = []string{"CT_INVALID"}
					}
					r.src, r.dst, r.control = at(ln.src), at(via), nil
					out = append(out, r)
				}
			}
		}
	}
	return append(out, l.optionRows()...)
}

// optionRows set the source route as a socket option, so that the destination that connect saw is not the packet's.
func (l *lab) optionRows() []*row {
	ln := l.lanes("v4")[0]
	r := ln.socketRow("IP source route as a socket option", ln.self(), attack.Spec{Proto: "udp", Tricks: []string{attack.Route, attack.Connect}, Dst: ln.dst,
		Via: l.under.v4}, "egress", "send EPERM", "NOT_TUNNEL")
	r.src, r.dst, r.control = at(ln.src), at(l.under.v4), nil
	return []*row{r}
}

// bypassRows ask for ways around the queue, where the judge of the device stands.
func (l *lab) bypassRows() []*row {
	var out []*row
	ln := l.lanes("v4")[0]
	for _, by := range []attacker{root, workload, ln.self()} {
		for _, device := range []string{tunnel, "lo", l.App.If} {
			r := ln.row("PACKET_QDISC_BYPASS", by, "setsockopt")
			r.path, r.family = device, "v4, v6"
			if device == l.App.If {
				r.path = "underlay"
			}
			r.step, r.refusal, r.differs = "bypass EPERM", unrecorded, "counted and recorded nowhere"
			r.make = func(token string) attack.Spec {
				return attack.Spec{Kind: attack.Packet, Device: device, Tricks: []string{attack.Bypass}, Drop: by.drop,
					Packets: forgedUDP(ln, netip.AddrPortFrom(ln.src, rawPort), token)}
			}
			out = append(out, r)
		}
		r := ln.row("AF_XDP", by, "setsockopt")
		r.path, r.family = "any device", "v4, v6"
		r.step, r.refusal, r.differs = "umem EPERM", unrecorded, "counted and recorded nowhere"
		r.make = func(string) attack.Spec { return attack.Spec{Kind: attack.XDP, Drop: by.drop} }
		out = append(out, r)
	}
	return out
}

// mixedRows use an address of the overlay on one end and one of another network on the other.
func (l *lab) mixedRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		outside := l.App.Underlay
		if ln.family == "v6" {
			outside = netip.IPv6Loopback()
		}
		for _, proto := range []string{"tcp", "udp"} {
			r := ln.socketRow("overlay destination from an address outside ("+proto+")", ln.self(), attack.Spec{Proto: proto, Tricks: []string{attack.Bind, attack.Connect},
				Src: at(outside), Dst: ln.dst}, "connect", "connect EACCES", "SPOOFED_SOURCE")
			r.src = at(outside)
			out = append(out, r)
		}
		if ln.family != "mapped" {
			for _, by := range []attacker{root, workload, ln.self()} {
				r := ln.rawRow("overlay destination from an address outside (raw)", by, attack.Raw, "egress", func(ln lane, _ netip.AddrPort, token string) [][]byte {
					return forgedUDP(ln, netip.AddrPortFrom(outside, rawPort), token)
				}, by.reason)
				r.src, r.control = netip.AddrPortFrom(outside, rawPort), nil
				out = append(out, r)
			}
		}
		out = append(out, l.outwards(ln))
	}
	return out
}

// outwards sends from the owner's overlay address to somewhere outside.
func (l *lab) outwards(ln lane) *row {
	to, reason := netip.AddrPortFrom(l.under.v4, portRemote), "NOT_TUNNEL"
	if ln.path == "lo" || ln.family == "v6" {
		to, reason = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), portLocal), "UNKNOWN_PEER"
		if ln.family == "v6" {
			to = netip.AddrPortFrom(netip.IPv6Loopback(), portLocal)
		}
	}
	r := ln.socketRow("destination outside from an overlay address", ln.self(), attack.Spec{Proto: "udp", Tricks: []string{attack.Bind, attack.Connect}, Src: at(ln.src), Dst: to},
		"egress", "send EPERM", reason)
	r.src, r.dst, r.control = at(ln.src), to, nil
	if ln.family == "v6" {
		r.path = "lo"
	}
	return r
}

// leakRows send past the tunnel.
func (l *lab) leakRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		if ln.path != "tunnel" {
			continue
		}
		device := attack.Spec{Proto: "udp", Tricks: []string{attack.Device, attack.Connect}, Dst: ln.dst, Device: ln.at.If}
		marked := attack.Spec{Proto: "udp", Tricks: []string{attack.Mark, attack.Connect}, Dst: ln.dst, Mark: mark}
		for _, by := range []attacker{root, nobody} {
			out = append(out, ln.socketRow("SO_BINDTODEVICE to the underlay", by, device, "connect", "connect EACCES", "NO_IDENTITY"))
		}
		out = append(out, ln.socketRow("SO_BINDTODEVICE to the underlay", ln.self(), device, "egress", "send EPERM", "NOT_TUNNEL"),
			ln.socketRow("SO_MARK with a route by the underlay", root, marked, "connect", "connect EACCES", "NO_IDENTITY"),
			ln.socketRow("SO_MARK with a route by the underlay", ln.self(), marked, "egress", "send EPERM", "NOT_TUNNEL"))
		if ln.family == "mapped" {
			continue
		}
		for _, by := range []attacker{root, workload, ln.self()} {
			for trick, name := range map[string]string{attack.Device: "SO_BINDTODEVICE to the underlay, raw", attack.Mark: "SO_MARK with a route by the underlay, raw"} {
				r := ln.rawRow(name, by, attack.Raw, "egress", forgedUDP, "NOT_TUNNEL")
				r.make = func(token string) attack.Spec {
					return attack.Spec{Kind: attack.Raw, Tricks: []string{trick}, Device: ln.at.If, Mark: mark, Drop: by.drop, Packets: forgedUDP(ln, r.src, token)}
				}
				out = append(out, r)
			}
			out = append(out, l.leakByPacket(ln, by)...)
		}
	}
	for _, r := range out {
		r.control, r.path = nil, "underlay"
	}
	return out
}

// leakByPacket puts overlay packets straight on the underlay's device.
func (l *lab) leakByPacket(ln lane, by attacker) []*row {
	var out []*row
	for name, f := range map[string]packetsOf{"AF_PACKET on the underlay": forgedUDP, "AF_PACKET on the underlay, overlay source only": func(ln lane, src netip.AddrPort, token string) [][]byte {
		to := netip.AddrPortFrom(l.under.of(ln.family), portRemote)
		return [][]byte{forge.UDPPacket(src, to, []byte(token))}
	}} {
		for claim, what := range map[uint16]string{0: "", claimOdd: ", claiming another protocol", ln.otherVersion(): ", claiming the other IP version"} {
			r := ln.rawRow(name+what, by, attack.Packet, "guard", f, "NOT_TUNNEL")
			r.src, r.dst = at(r.src.Addr()), netip.AddrPort{} // of a disguised packet the guard reads no ports
			r.make = func(token string) attack.Spec {
				return attack.Spec{Kind: attack.Packet, Device: ln.at.If, MAC: l.dataMAC, Frame: claim != 0, Claim: claim, Drop: by.drop,
					Packets: f(ln, netip.AddrPortFrom(ln.src, rawPort), token)}
			}
			out = append(out, r)
		}
	}
	return out
}

// neighbour is a machine on the underlay that is not in the mesh; its packets need no permission.
var neighbour = attacker{name: "neighbour", as: netlab.Opts{}}
