package matrix

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/probe/forge"
	"github.com/signet-overlay/signet/integration/probe/rogue"
	"github.com/signet-overlay/signet/integration/scenario"
)

// unrecorded is the outcome of calls that fail without a counter or record: the attacker's error is all there is.
func unrecorded(_ *testing.T, r *row) (hook, reason string) {
	return r.hook, r.step[strings.LastIndexByte(r.step, ' ')+1:]
}

// underlayRows come in clear from a neighbour, straight to the host's link-layer address.
func (l *lab) underlayRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6") {
		if ln.path != "tunnel" {
			continue
		}
		ln.at, ln.judge, ln.path = l.outsider, l.Data, "underlay"
		strange := netip.MustParseAddr("203.0.113.9") // TEST-NET-3: a source of no network here
		if ln.family == "v6" {
			strange = netip.MustParseAddr("2001:db8::9")
		}
		add := func(name string, src netip.Addr, f packetsOf, reasons ...string) {
			r := ln.rawRow(name, neighbour, attack.Packet, "guard", f, reasons...)
			r.src, r.dst = at(src), at(ln.dst.Addr())
			r.make = func(token string) attack.Spec {
				return attack.Spec{Kind: attack.Packet, Device: l.outsider.If, MAC: l.dataMAC, Packets: f(ln, netip.AddrPortFrom(src, rawPort), token)}
			}
			// What is not the overlay's arrives, as on any host.
			under := ln
			under.dst = netip.AddrPortFrom(l.under.of(ln.family), portRemote)
			r.control = func(token string) attack.Spec {
				return attack.Spec{Kind: attack.Packet, Device: l.outsider.If, MAC: l.dataMAC, Packets: forgedUDP(under, netip.AddrPortFrom(strange, rawPort), token)}
			}
			r.owner = ""
			out = append(out, r)
		}
		add("cleartext from the LAN, forged source", ln.src, forgedUDP, "NOT_TUNNEL")
		add("cleartext from the LAN, own source", strange, forgedUDP, "NOT_TUNNEL")
		add("cleartext from the LAN, TCP SYN", ln.src, forgedSYN, "NOT_TUNNEL")
		add("cleartext from the LAN, echo request", strange, func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.EchoRequest(src.Addr(), ln.dst.Addr(), 7, []byte(token))}
		}, "NOT_TUNNEL")
		add("cleartext from the LAN, fragments", ln.src, func(ln lane, src netip.AddrPort, token string) [][]byte {
			return forge.Fragments(src, ln.dst, append([]byte(token), make([]byte, 64)...), 48)
		}, "FRAGMENT", "NOT_TUNNEL")
		out[len(out)-1].packets = 2
		kind := byte(0)
		if ln.family == "v6" {
			kind = 4
		}
		add("cleartext from the LAN, source-routed through the host", strange, func(ln lane, src netip.AddrPort, token string) [][]byte {
			return [][]byte{forge.SourceRouted(src, ln.dst, l.under.of(ln.family), kind, []byte(token))}
		}, "NOT_TUNNEL")
		last := out[len(out)-1]
		// The guard sees the first hop only; the host then turns the packet to its own overlay address.
		last.hook = "ingress"
		if ln.family == "v6" {
			last.reasons = []string{"MALFORMED", "NOT_TUNNEL"}
		}
	}
	return out
}

// rogueHost is the bastion without its agent: its keys are valid, and nothing judges what it sends.
type rogueHost struct {
	l     *lab
	cmd   *netlab.Cmd
	lines io.WriteCloser
	sent  int
}

func startScript(t *testing.T, l *lab) *rogueHost {
	t.Helper()
	key := peerKey(t, l)
	_, err := l.Edge.Signet(l.ctx, "down", "--release")
	must(t, err)
	must(t, l.Edge.StopAgent())
	config, err := json.Marshal(rogue.Config{StateDir: l.Edge.StateDir(), KeyFile: filepath.Join(l.Edge.Dir(), "agent.key"), Listen: 51820,
		PeerKey: key, Peer: netip.AddrPortFrom(l.Data.Underlay, 51820)})
	must(t, err)
	file := filepath.Join(l.Edge.Dir(), "script.json")
	must(t, os.WriteFile(file, config, 0o600))
	in, lines := io.Pipe()
	cmd := l.Edge.Host.Command(l.ctx, netlab.Opts{Stdin: in}, l.Bin("probe"), "script", file)
	must(t, cmd.Start())
	t.Cleanup(func() { lines.Close() })
	must(t, cmd.WaitFor(l.ctx, "rogue as"))
	return &rogueHost{l: l, cmd: cmd, lines: lines}
}

// send puts packets into the tunnel.
func (h *rogueHost) send(t *testing.T, packets ...[]byte) string {
	t.Helper()
	for _, p := range packets {
		_, err := fmt.Fprintln(h.lines, hex.EncodeToString(p))
		must(t, err)
		h.sent++
		ctx, cancel := context.WithTimeout(h.l.ctx, patient)
		err = h.cmd.WaitFor(ctx, fmt.Sprintf("sent %d\n", h.sent))
		cancel()
		must(t, err)
	}
	return fmt.Sprintf("step sent ok (%d packets)\n", len(packets))
}

// reaches sends what is allowed, and reports whether it arrives.
func (h *rogueHost) reaches(t *testing.T) bool {
	t.Helper()
	token := fmt.Sprintf("%sr%d-", attack.Token, h.sent)
	src, dst := netip.AddrPortFrom(h.l.edge.v4, rawPort), netip.AddrPortFrom(h.l.pg.v4, portEdge)
	h.send(t, forge.UDPPacket(src, dst, []byte(token)))
	src6, dst6 := netip.AddrPortFrom(h.l.edge.v6, rawPort), netip.AddrPortFrom(h.l.pg.v6, portEdge)
	h.send(t, forge.UDPPacket(src6, dst6, []byte(token)))
	return until(3*patient, func() bool { return strings.Count(h.l.sees[scenario.Postgres].Text(), token) == 2 })
}

// peers asks the database's host for its peers.
func (l *lab) peers(t *testing.T, a *scenario.Agent) []peerStatus {
	t.Helper()
	out, err := a.Signet(l.ctx, "peers", "-o", "json")
	must(t, err)
	var list []peerStatus
	must(t, json.Unmarshal([]byte(out), &list))
	return list
}

// rogueRows are what a host of the mesh sends whose own judge is gone: the other host refuses it.
func (l *lab) rogueRows() []*row {
	var out []*row
	for _, family := range []string{"v4", "v6"} {
		own := netip.AddrPortFrom(l.edge.of(family), rawPort)
		open := netip.AddrPortFrom(l.pg.of(family), portEdge)
		shut := netip.AddrPortFrom(l.pg.of(family), portUnlisted)
		inside := netip.AddrPortFrom(l.backup.of(family), portUnlisted)
		for _, c := range rogueCases(l, family, own, open, shut, inside) {
			r := &row{attack: c.name, variant: "rogue", family: family, path: "tunnel", judge: l.Data, at: l.Edge, hook: "tunnel_ingress", reasons: c.reasons,
				dst: c.dst, victim: scenario.Postgres}
			if c.hook != "" {
				r.hook = c.hook
			}
			r.do = func(t *testing.T, r *row) string { return l.script.send(t, c.packets([]byte(r.token))...) }
			r.packets = uint64(len(c.packets(nil)))
			if c.dst.IsValid() {
				r.src = at(own.Addr())
			}
			out = append(out, r)
		}
		for name, src := range l.stolen(family) {
			r := &row{attack: "source of " + name, variant: "rogue", family: family, path: "tunnel", judge: l.Data, at: l.Edge, hook: "cryptokey routing"}
			r.do = func(t *testing.T, r *row) string {
				before := refusedOf(l.peers(t, l.Data))
				said := l.script.send(t, forge.UDPPacket(netip.AddrPortFrom(src, rawPort), open, []byte(r.token)))
				if until(patient, func() bool { return refusedOf(l.peers(t, l.Data)) > before }) {
					return said + "counted\n"
				}
				return said
			}
			r.refusal = func(t *testing.T, r *row) (string, string) {
				if !strings.Contains(r.output, "counted\n") {
					t.Errorf("the peer's counter of refused sources did not move: %s", r.output)
				}
				return r.hook, "counted per peer"
			}
			out = append(out, r)
		}
	}
	return out
}

// stolen are sources that the rogue's keys are not bound to.
func (l *lab) stolen(family string) map[string]netip.Addr {
	if family == "v4" {
		return map[string]netip.Addr{"another host's workload": l.api.v4, "the victim itself": l.pg.v4, "loopback": netip.MustParseAddr("127.0.0.1"),
			"nobody": netip.IPv4Unspecified(), "multicast": netip.MustParseAddr("224.0.0.1"), "the victim's underlay": l.under.v4}
	}
	return map[string]netip.Addr{"another host's workload": l.api.v6, "the victim itself": l.pg.v6, "loopback": netip.IPv6Loopback(),
		"nobody": netip.IPv6Unspecified(), "multicast": netip.MustParseAddr("ff02::1"), "the victim's underlay": l.under.v6,
		"a mapped IPv4 address": netip.MustParseAddr("::ffff:" + l.edge.v4.String())}
}

func refusedOf(peers []peerStatus) (n uint64) {
	for _, p := range peers {
		n += p.RefusedSource
	}
	return n
}

type peerStatus struct {
	Node          string
	Key           string
	RefusedSource uint64 `json:"refused_source"`
}

func peerKey(t *testing.T, l *lab) string {
	t.Helper()
	peers := l.peers(t, l.Edge)
	i := slices.IndexFunc(peers, func(p peerStatus) bool { return p.Node == scenario.DataHost })
	if i < 0 {
		t.Fatalf("the bastion has no peer %s: %v", scenario.DataHost, peers)
	}
	return hexKey(t, peers[i].Key)
}
