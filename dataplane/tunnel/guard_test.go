package tunnel

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

// fakeTUN yields the same batch at every read.
type fakeTUN struct {
	tun.Device
	packets [][]byte
}

func (f *fakeTUN) Read(slab []byte, packets []tun.ReadPacket) (int, error) {
	at := tun.ReadPacketSpacing
	for i, p := range f.packets {
		packets[i] = tun.ReadPacket{Offset: at, Size: copy(slab[at:], p)}
		at += packets[i].Size + tun.ReadPacketSpacing
	}
	return len(f.packets), nil
}

func (f *fakeTUN) Close() error { return os.ErrClosed }

func packet4(src string) []byte {
	p := make([]byte, 28)
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[8], p[9] = 64, unix.IPPROTO_UDP
	copy(p[12:], netip.MustParseAddr(src).AsSlice())
	return p
}

func packet6(src string) []byte {
	p := make([]byte, 48)
	p[0] = 0x60
	p[5], p[6], p[7] = 8, unix.IPPROTO_UDP, 64
	copy(p[8:], netip.MustParseAddr(src).AsSlice())
	return p
}

func batch(n int) (slab []byte, packets []tun.ReadPacket) {
	return make([]byte, (n+1)*2048), make([]tun.ReadPacket, n)
}

func TestGuardEmptiesForeignSources(t *testing.T) {
	sent := [][]byte{
		packet4("198.18.0.1"), packet4("198.18.0.2"), packet6("fd5e::1"), packet6("fd5e::2"), // own, foreign, own, foreign
		packet4("0.0.0.0"), packet6("::"), // the kernel's own
		{0x45}, {0x60, 0, 0}, {0x00, 1, 2, 3}, {}, // too short, another version, empty
		packet4("198.18.0.1"),
	}
	g := newGuard(&fakeTUN{packets: sent})
	slab, packets := batch(len(sent))
	g.own.Store(newAddrSet([]netip.Addr{netip.MustParseAddr("::ffff:198.18.0.1"), netip.MustParseAddr("fd5e::1"), {}}))
	n, err := g.Read(slab, packets)
	if n != len(sent) || err != nil {
		t.Fatal(n, err)
	}
	var sizes []int
	for _, p := range packets {
		sizes = append(sizes, p.Size)
	}
	if want := []int{28, 0, 48, 0, 0, 0, 0, 0, 0, 0, 28}; !slices.Equal(sizes, want) {
		t.Errorf("sizes %v, want %v", sizes, want)
	}
	if got := g.foreign.Load(); got != 6 {
		t.Errorf("%d counted, want 6", got)
	}
}

func TestGuardStartsClosed(t *testing.T) {
	g := newGuard(&fakeTUN{packets: [][]byte{packet4("198.18.0.1")}})
	slab, packets := batch(1)
	if _, err := g.Read(slab, packets); err != nil || packets[0].Size != 0 {
		t.Errorf("a packet passed before addresses were set: %v, %v", packets, err)
	}
	if a, b := g.Close(), g.Close(); a == nil || a != b {
		t.Errorf("close: %v, then %v", a, b)
	}
	if _, open := <-g.Events(); open {
		t.Error("an event after close")
	}
}

func TestGuardDoesNotAllocate(t *testing.T) {
	g := newGuard(&fakeTUN{packets: [][]byte{packet4("198.18.0.1"), packet6("fd5e::9")}})
	g.own.Store(newAddrSet([]netip.Addr{netip.MustParseAddr("198.18.0.1")}))
	slab, packets := batch(2)
	if n := testing.AllocsPerRun(100, func() { _, _ = g.Read(slab, packets) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkGuard is the cost of one packet in a full batch, beyond what reading it costs: compare judge with copy.
func BenchmarkGuard(b *testing.B) {
	for name, packet := range map[string][]byte{"v4": packet4("198.18.0.1"), "v6": packet6("fd5e::1")} {
		b.Run("judge/"+name, func(b *testing.B) {
			addrs := []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd5e::1")}
			for i := range 30 {
				addrs = append(addrs, netip.AddrFrom4([4]byte{198, 18, 1, byte(i)}), netip.AddrFrom16([16]byte{0xfd, 0x5e, 15: byte(i + 2)}))
			}
			set := newAddrSet(addrs)
			b.ReportAllocs()
			for b.Loop() {
				if set.judge(packet) != ownSource {
					b.Fatal("own packet refused")
				}
			}
		})
	}
}

// TestQdiscBypassIsStopped sends with PACKET_QDISC_BYPASS, which no tc program sees, from an address that is not the
// host's own. The same packet from its own address arrives.
func TestQdiscBypassIsStopped(t *testing.T) {
	a, b := newPair(t, bothEmbedded)
	eventually(t, 2*time.Second, "a handshake", func() bool { return a.status(b.private.Public()).Up })
	for name, c := range map[string]struct{ forged, own []byte }{
		"v4": {packet4("198.18.0.99"), packet4(a.v4().String())},
		"v6": {packet6("fd5e::99"), packet6(a.v6().String())},
	} {
		own := c.own
		copyDestination(own, b)
		copyDestination(c.forged, b)
		refused, rx := a.tunnel.RefusedOwn(), b.status(a.private.Public()).RxBytes
		a.bypass(c.forged)
		eventually(t, 2*time.Second, name+": the forged packet is counted", func() bool { return a.tunnel.RefusedOwn() == refused+1 })
		if s := b.status(a.private.Public()); s.RxBytes != rx || s.RefusedSource != 0 {
			t.Errorf("%s: the forged packet left the host: %+v", name, s)
		}
		a.bypass(own)
		eventually(t, 2*time.Second, name+": the own packet arrives", func() bool { return b.status(a.private.Public()).RxBytes > rx })
	}
}

func copyDestination(packet []byte, to *host) {
	if packet[0]>>4 == 4 {
		copy(packet[16:], to.v4().AsSlice())
		return
	}
	copy(packet[24:], to.v6().AsSlice())
}

// bypass sends a raw packet into the tunnel device past its queueing discipline.
func (h *host) bypass(packet []byte) {
	h.t.Helper()
	var err error
	h.do(func() {
		proto := uint16(unix.ETH_P_IP)
		if packet[0]>>4 == 6 {
			proto = unix.ETH_P_IPV6
		}
		var fd int
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		if err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return
		}
		var link *net.Interface
		if link, err = net.InterfaceByName(device0); err != nil {
			return
		}
		err = unix.Sendto(fd, packet, 0, &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: link.Index})
	})
	if err != nil {
		h.t.Fatalf("send past the queueing discipline: %v", err)
	}
}

// TestRefusedSourceIsCounted has a host send from an address that its peer does not know as its own: cryptokey
// routing drops it there, and the drop is counted for that peer. This also pins the engine's log formats.
func TestRefusedSourceIsCounted(t *testing.T) {
	a, b := newPair(t, bothEmbedded)
	peer := a.private.Public()
	eventually(t, 2*time.Second, "a handshake", func() bool { return b.status(peer).Up })
	extra4, extra6 := netip.MustParseAddr("198.18.0.50"), netip.MustParseAddr("fd5e::50")
	a.ip("addr add 198.18.0.50/32 dev " + device0)
	a.ip("addr add fd5e::50/128 dev " + device0 + " nodad")
	a.tunnel.SetOwnAddresses([]netip.Addr{a.v4(), a.v6(), extra4, extra6})
	defer func() {
		t.Logf("receiver %+v, sender %+v, refused there %d", b.status(peer), a.status(b.private.Public()), a.tunnel.RefusedOwn())
	}()
	var want uint64
	for _, c := range []struct{ from, to netip.Addr }{{extra4, b.v4()}, {extra6, b.v6()}} {
		for range 3 {
			a.send(c.from, c.to)
		}
		want += 3
		eventually(t, 2*time.Second, fmt.Sprintf("%d refused packets are counted, the last from %v", want, c.from), func() bool {
			return b.status(peer).RefusedSource == want
		})
	}
	a.send(a.v4(), b.v4()) // a bound source is not refused
	if out, err := a.run("ping", "-c", "1", "-W", "2", "-I", a.v6().String(), b.v6().String()); err != nil {
		t.Errorf("ping: %v: %s", err, out)
	}
	if s := b.status(peer); s.RefusedSource != want {
		t.Errorf("refused %d, want %d", s.RefusedSource, want)
	}
	if s := a.status(b.private.Public()); s.RefusedSource != 0 {
		t.Errorf("the sender counted %d", s.RefusedSource)
	}
}

// send sends one datagram from a chosen source.
func (h *host) send(from, to netip.Addr) {
	h.t.Helper()
	var err error
	h.do(func() {
		var c *net.UDPConn
		if c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 9))); err == nil {
			_, err = c.Write([]byte("x"))
			_ = c.Close()
		}
	})
	if err != nil {
		h.t.Fatal(err)
	}
}
