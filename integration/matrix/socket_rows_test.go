package matrix

import (
	"fmt"
	"net/netip"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/scenario"
)

// lane is an allowed flow that attackers want to be taken for.
type lane struct {
	path, family string
	six          bool       // the socket is an IPv6 one
	src          netip.Addr // of the rightful owner
	dst          netip.AddrPort
	other        netip.Addr // another workload's address on the owner's host
	foreign      netip.Addr // an overlay address that nobody has
	owner        string     // cgroup of the owner
	victim       string     // cgroup of the destination
	at, judge    *scenario.Agent
	device       string // that the flow leaves by
	below        string // hook of that device
}

func (ln lane) String() string { return fmt.Sprintf("%s %s to %v", ln.path, ln.family, ln.dst) }

// lanes are towards the other host and within one, for each family.
func (l *lab) lanes(families ...string) []lane {
	var out []lane
	for _, f := range families {
		foreign := netip.MustParseAddr("198.19.255.77")
		if f == "v6" {
			a := l.api.v6.As16()
			copy(a[8:], []byte{0xff, 0xff, 0, 0, 0, 0, 0, 0x77})
			foreign = netip.AddrFrom16(a)
		}
		out = append(out,
			lane{path: "tunnel", family: f, six: f != "v4", src: l.api.of(f), dst: netip.AddrPortFrom(l.pg.of(f), portRemote), other: l.batch.of(f), foreign: foreign,
				owner: scenario.APIServer, victim: scenario.Postgres, at: l.App, judge: l.App, device: tunnel, below: "tunnel_egress"},
			lane{path: "lo", family: f, six: f != "v4", src: l.hook.of(f), dst: netip.AddrPortFrom(l.api.of(f), portLocal), other: l.batch.of(f), foreign: foreign,
				owner: scenario.Webhook, victim: scenario.APIServer, at: l.App, judge: l.App, device: "lo", below: "lo_egress"})
	}
	return out
}

// attacker is somebody on the host; reason is what its forgeries are refused for.
type attacker struct {
	name   string
	as     netlab.Opts
	reason string
	drop   bool
}

var (
	root     = attacker{"root", netlab.Opts{Cgroup: scenario.Stranger}, "NO_IDENTITY", true}
	nobody   = attacker{"nobody", netlab.Opts{Cgroup: scenario.Stranger, UID: uidBody}, "NO_IDENTITY", false}
	workload = attacker{"workload", netlab.Opts{Cgroup: batch}, "SPOOFED_SOURCE", true}
)

// self is the owner of a lane as an attacker.
func (ln lane) self() attacker {
	return attacker{"owner", netlab.Opts{Cgroup: ln.owner}, "SPOOFED_SOURCE", true}
}

// row begins a row of a lane and an attacker; dst is recorded in full.
func (ln lane) row(name string, by attacker, hook string, reasons ...string) *row {
	return &row{attack: name, variant: by.name, family: ln.family, path: ln.path, at: ln.at, as: by.as, judge: ln.judge, hook: hook, reasons: reasons,
		target: ln.dst, dst: ln.dst, owner: ln.owner, victim: ln.victim}
}

// socketRow is a row of a socket attack; the control is the same with the owner's own address.
func (ln lane) socketRow(name string, by attacker, s attack.Spec, hook, step string, reasons ...string) *row {
	r := ln.row(name, by, hook, reasons...)
	s.Kind, s.V6, r.step = attack.Socket, ln.six, step
	r.control = func(token string) attack.Spec {
		own := s
		if own.Src.IsValid() {
			own.Src = netip.AddrPortFrom(ln.src, s.Src.Port())
		}
		own.Payload, own.Wait = token, 3000
		return own
	}
	r.make = func(token string) attack.Spec {
		s.Payload, s.Drop = token, by.drop
		return s
	}
	return r
}

func at(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 0) }

// bindRows claim an address by bind.
func (l *lab) bindRows() []*row {
	var out []*row
	claim := func(ln lane, name string, by attacker, src netip.Addr, tricks ...string) {
		r := ln.socketRow(name, by, attack.Spec{Proto: "udp", Tricks: append(tricks, attack.Bind, attack.Connect), Src: at(src), Dst: ln.dst},
			"bind", "bind EPERM", by.reason)
		r.src, r.dst = at(src), netip.AddrPort{}
		out = append(out, r)
	}
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		for _, by := range []attacker{root, nobody, workload} {
			claim(ln, "bind to a workload's address", by, ln.src)
			claim(ln, "IP_FREEBIND with a foreign address", by, ln.foreign, attack.FreeBind)
			if by.name != nobody.name { // the kernel itself refuses it to those without CAP_NET_RAW
				claim(ln, "IP_TRANSPARENT with a foreign address", by, ln.foreign, attack.Transparent)
			}
		}
		claim(ln, "IP_FREEBIND with a foreign address", ln.self(), ln.foreign, attack.FreeBind)
		claim(ln, "SO_REUSEPORT bind beside a workload's listener", root, ln.src, attack.ReusePort)
	}
	return out
}

// datagramRows claim an address in ancillary data.
func (l *lab) datagramRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		for _, by := range []attacker{root, nobody, workload} {
			r := ln.socketRow("UDP packet information, unconnected", by,
				attack.Spec{Proto: "udp", Tricks: []string{attack.PacketInfo}, Src: at(ln.src), Dst: ln.dst}, "connect", "send EACCES", by.reason)
			r.src = at(ln.src)
			out = append(out, r)
		}
		// To be connected at all, a socket must be of a workload that may; it then claims its neighbour's address.
		for _, uid := range []int{0, uidBody} {
			by := ln.self()
			by.as.UID, by.drop = uid, uid == 0
			if uid != 0 {
				by.name = "owner as nobody"
			}
			r := ln.socketRow("UDP packet information, connected", by,
				attack.Spec{Proto: "udp", Tricks: []string{attack.Connect, attack.PacketInfo}, Src: at(ln.other), Dst: ln.dst}, "connect", "send EACCES", by.reason)
			r.src = at(ln.other)
			out = append(out, r)
		}
	}
	return out
}

// callRows just call; the kernel would choose the victim's own address as source within one host.
func (l *lab) callRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		for _, by := range []attacker{root, nobody, workload} {
			reason := by.reason
			if by.name == workload.name {
				reason = "NO_RULE" // it would be itself, for which no rule is
			}
			tcp := attack.Spec{Proto: "tcp", Tricks: []string{attack.Connect}, Dst: ln.dst}
			mptcp, fast, udp := tcp, tcp, tcp
			mptcp.Proto, udp.Proto, fast.Tricks = "mptcp", "udp", []string{attack.FastOpen}
			unconnected := attack.Spec{Proto: "udp", Dst: ln.dst}
			out = append(out, ln.socketRow("TCP connect", by, tcp, "connect", "connect EACCES", reason),
				ln.socketRow("MPTCP connect", by, mptcp, "connect", "connect EACCES", reason),
				ln.socketRow("TCP_FASTOPEN", by, fast, "connect", "fastopen EACCES", reason),
				ln.socketRow("UDP connect", by, udp, "connect", "connect EACCES", reason),
				ln.socketRow("UDP sendto", by, unconnected, "connect", "send EACCES", reason))
		}
		for _, proto := range []string{"tcp", "udp"} {
			any := netip.IPv4Unspecified()
			if ln.family == "v6" {
				any = netip.IPv6Unspecified()
			}
			port := map[string]uint16{"tcp": 47001, "udp": 47002}[proto]
			r := ln.socketRow("connect from an explicit source port ("+proto+")", ln.self(), attack.Spec{Proto: proto, Tricks: []string{attack.Bind, attack.Connect},
				Src: netip.AddrPortFrom(any, port), Dst: ln.dst}, "connect", "connect EACCES", "SOURCE_BOUND")
			r.control = nil
			out = append(out, r)
		}
		if ln.family != "mapped" {
			ping := attack.Spec{Proto: "ping", Tricks: []string{attack.Connect}, Dst: ln.dst}
			for _, by := range []attacker{root, nobody} {
				connected := ln.socketRow("ping socket, connected", by, ping, "connect", "connect EACCES", by.reason)
				direct := ln.socketRow("ping socket, sendto", by, attack.Spec{Proto: "ping", Dst: ln.dst}, "egress", "send EPERM", by.reason)
				if ln.six {
					direct.step = "send ok" // the kernel keeps the refusal to itself
				}
				connected.dst, direct.dst, direct.control = at(ln.dst.Addr()), at(ln.dst.Addr()), nil
				out = append(out, connected, direct)
			}
		}
		fresh := root
		fresh.name, fresh.as.Cgroup = "unknown cgroup", "system.slice/fresh-"+ln.path+ln.family+".service"
		out = append(out, ln.socketRow("UDP sendto", fresh, attack.Spec{Proto: "udp", Dst: ln.dst}, "connect", "send EACCES", "NO_IDENTITY"))
	}
	return out
}
