package enforce

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
)

// The lab's underlay: the host, the far end, and two more addresses of the far end.
var (
	underHere  = netip.MustParseAddr("10.99.0.1")
	underFar   = netip.MustParseAddr("10.99.0.2")
	underPeer  = netip.MustParseAddr("10.99.0.3")
	underEnemy = netip.MustParseAddr("10.99.0.66")
)

// floodLab is a lab whose far end has a peer's address and an enemy's.
func floodLab(t *testing.T) *lab {
	t.Helper()
	l := newLab(t)
	l.inFar(func() {
		l.ip("addr add 10.99.0.3/24 dev far0")
		l.ip("addr add 10.99.0.66/24 dev far0")
	})
	return l
}

// guard opens a flood guard on the lab's underlay.
func (l *lab) guard(cfg FloodConfig, devices ...string) *Flood {
	l.t.Helper()
	cfg.Port, cfg.Interfaces = floodPort, devices
	f, err := OpenFlood(cfg)
	must(l.t, err, "open the flood guard")
	l.t.Cleanup(func() { must(l.t, f.Close(), "close the flood guard") })
	return f
}

// udp opens a socket in the namespace that the test is in.
func (l *lab) udp(addr netip.Addr, port uint16) *net.UDPConn {
	l.t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
	must(l.t, err, "open a socket")
	must(l.t, c.SetReadBuffer(4<<20), "ask for a large buffer")
	l.t.Cleanup(func() { c.Close() })
	return c
}

// udpFar opens a socket at the far end.
func (l *lab) udpFar(addr netip.Addr) (c *net.UDPConn) {
	l.inFar(func() { c = l.udp(addr, 0) })
	return c
}

// drain counts what a socket has received of each length.
func drain(t *testing.T, c *net.UDPConn) map[int]int {
	t.Helper()
	got := map[int]int{}
	buf := make([]byte, 2048)
	for {
		must(t, c.SetReadDeadline(time.Now().Add(quiet)), "set deadline")
		n, err := c.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return got
		}
		must(t, err, "read")
		got[n]++
	}
}

// TestFloodModes: each device gets the best mode that it takes, what refused a better one is told, and closing leaves
// nothing behind.
func TestFloodModes(t *testing.T) {
	l := newLab(t)
	l.ip("link add dull0 type bridge")
	l.ip("link add busy0 type veth peer name busy1")
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	must(t, err, "load another tool's program")
	defer other.Close()
	taken, err := link.AttachXDP(link.XDPOptions{Program: other, Interface: l.index("busy0"), Flags: link.XDPGenericMode})
	must(t, err, "attach another tool's program")
	defer taken.Close()

	f := l.guard(FloodConfig{}, "under0", "dull0", "busy0", "sig0", "lo")
	want := map[string]FloodMode{"under0": FloodNative, "dull0": FloodGeneric, "busy0": FloodTC, "sig0": FloodTC, "lo": FloodGeneric}
	for _, s := range f.Status() {
		if s.Mode != want[s.Interface] || !s.Attached || (s.Refused == nil) != (s.Mode == FloodNative) {
			t.Errorf("%s: %v, attached %v, refused: %v; want %v", s.Interface, s.Mode, s.Attached, s.Refused, want[s.Interface])
		}
		delete(want, s.Interface)
	}
	if len(want) > 0 {
		t.Errorf("no status of %v", want)
	}
	if s := f.Status()[slices.IndexFunc(f.Status(), func(s FloodStatus) bool { return s.Interface == "sig0" })]; !errors.Is(s.Refused, errNoEthernet) {
		t.Errorf("the tunnel refused XDP with %v", s.Refused)
	}

	// A device that goes and comes back; another that is detached.
	l.ip("link del dull0")
	if i := slices.IndexFunc(f.Status(), func(s FloodStatus) bool { return s.Interface == "dull0" && !s.Attached }); i < 0 {
		t.Error("the guard of a device that is gone is called attached")
	}
	if err := f.Attach("dull0"); err == nil {
		t.Error("a device that is gone was guarded")
	}
	l.ip("link add dull0 type bridge")
	must(t, f.Attach("dull0"), "attach anew")
	must(t, f.Attach("under0"), "attach twice")
	must(t, f.Detach("lo"), "detach")
	must(t, f.Detach("lo"), "detach twice")
	for _, s := range f.Status() {
		if !s.Attached || s.Interface == "lo" {
			t.Errorf("%+v", s)
		}
	}

	must(t, f.Close(), "close")
	for _, dev := range []string{"under0", "dull0", "lo"} {
		out, err := exec.Command("ip", "link", "show", dev).CombinedOutput()
		must(t, err, "ip link")
		if strings.Contains(string(out), "xdp") {
			t.Errorf("after close: %s", out)
		}
	}
	if err := f.Attach("under0"); !errors.Is(err, ErrClosed) {
		t.Errorf("attach after close: %v", err)
	}
	if _, err := f.Counters(); !errors.Is(err, ErrClosed) {
		t.Errorf("counters after close: %v", err)
	}
	if err := f.SetKnown(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("set known after close: %v", err)
	}
	must(t, f.Close(), "close twice")
}

// TestFloodModeAsked: a mode that is asked for by name and not to be had is an error, not another mode.
func TestFloodModeAsked(t *testing.T) {
	l := newLab(t)
	l.ip("link add dull0 type bridge")
	for dev, mode := range map[string]FloodMode{"dull0": FloodNative, "sig0": FloodGeneric, "none0": FloodTC} {
		if f, err := OpenFlood(FloodConfig{Port: floodPort, Mode: mode, Interfaces: []string{dev}}); err == nil {
			t.Errorf("%v on %s was promised", mode, dev)
			must(t, f.Close(), "close")
		}
	}
}

// TestFloodOnWire sends a hundred thousand initiations over a wire, in every mode: what a socket receives is the burst.
// Everything else on the device arrives as if there were no guard.
func TestFloodOnWire(t *testing.T) {
	const flood, burst = 100_000, 64
	for _, mode := range []FloodMode{FloodNative, FloodGeneric, FloodTC} {
		t.Run(mode.String(), func(t *testing.T) {
			l := floodLab(t)
			wire, beside := l.udp(underHere, floodPort), l.udp(underHere, floodPort+1)
			f := l.guard(FloodConfig{Mode: mode, PerSource: FloodRate{time.Hour, burst}}, "under0")
			must(t, f.SetKnown([]netip.Addr{underPeer}), "set known addresses")
			enemy, peer := l.udpFar(underEnemy), l.udpFar(underPeer)
			send := func(c *net.UDPConn, port uint16, times int, message []byte) {
				for range times {
					_, err := c.WriteToUDPAddrPort(message, netip.AddrPortFrom(underHere, port))
					must(t, err, "send")
				}
			}
			began := time.Now()
			send(enemy, floodPort, flood, wireguard(1, 148))
			t.Logf("%d initiations sent in %v", flood, time.Since(began).Round(time.Millisecond))
			send(enemy, floodPort, 5, wireguard(4, 1452))    // data, by which nobody is judged
			send(enemy, floodPort, 7, wireguard(2, 91))      // no response
			send(peer, floodPort, 10, wireguard(1, 148))     // a peer's own
			send(enemy, floodPort+1, 200, wireguard(1, 148)) // to another port
			if got := drain(t, wire); got[148] != burst+10 || got[1452] != 5 || got[91] != 0 {
				t.Errorf("arrived at WireGuard's port, by length: %v", got)
			}
			if got := drain(t, beside); got[148] != 200 {
				t.Errorf("arrived beside it, by length: %v", got)
			}
			got, err := f.Counters()
			must(t, err, "counters")
			if want := (FloodCounters{Passed: burst + 10 + 5, BadLength: 7, RateSource: flood - burst}); got != want {
				t.Errorf("counted %+v, want %+v", got, want)
			}
			must(t, exec.Command("ping", "-c", "1", "-W", "2", underFar.String()).Run(), "ping beside the flood")
		})
	}
}

// TestFloodGlued: a run of datagrams that reaches tc as one packet pays for each of its initiations.
func TestFloodGlued(t *testing.T) {
	l := floodLab(t)
	wire := l.udp(underHere, floodPort)
	f := l.guard(FloodConfig{Mode: FloodTC, PerSource: FloodRate{time.Hour, 30}}, "under0")
	enemy := l.udpFar(underEnemy)
	raw, err := enemy.SyscallConn()
	must(t, err, "raw socket")
	must(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, 148) }), "control")
	must(t, err, "let the kernel cut")
	for range 4 {
		_, err := enemy.WriteToUDPAddrPort(slices.Concat(slices.Repeat([][]byte{wireguard(1, 148)}, 9)...), netip.AddrPortFrom(underHere, floodPort))
		must(t, err, "send")
	}
	if got := drain(t, wire); got[148] != 27 {
		t.Errorf("of four times nine initiations %v arrived, by length; want 27", got)
	}
	if got := floodCounts(t, f); got[bpf.FloodPassed] != 27 || got[bpf.FloodRateSource] != 9 {
		t.Errorf("counted %v", got)
	}
}

// TestFloodPlain: a device without link header is guarded in tc.
func TestFloodPlain(t *testing.T) {
	l := newLab(t)
	l.ip("link set sig0 up")
	f := l.guard(FloodConfig{}, "sig0")
	l.inject(floodUDP(remote4, a4, wireguard(9, 64)))
	l.inject(floodUDP(remote6, a6, wireguard(2, 91)))
	l.inject(floodUDP(remote4, a4, wireguard(4, 64)))
	if got, want := floodCounts(t, f), [bpf.FloodCauses]uint64{1, 1, 1, 0, 0}; got != want {
		t.Errorf("counted %v, want %v", got, want)
	}
}

// bareWireGuard starts WireGuard without Signet in the namespace that the test is in, and gives it an overlay address.
func (l *lab) bareWireGuard(probe, dev, addr, config string) {
	l.t.Helper()
	cmd := exec.Command(probe, "bare", dev)
	cmd.Stdin = strings.NewReader(config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	must(l.t, err, "pipe")
	must(l.t, cmd.Start(), "start WireGuard")
	l.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed: its status says nothing
	})
	line := make([]byte, 256)
	n, err := out.Read(line)
	if err != nil || !strings.Contains(string(line[:n]), "ready") {
		l.t.Fatalf("WireGuard on %s: %q, %v", dev, line[:n], err)
	}
	l.ip("addr add " + addr + " dev " + dev)
	l.ip("link set " + dev + " mtu 1420 up")
}

// floodUntil sends initiations until it is told to stop.
func floodUntil(stop <-chan struct{}, c *net.UDPConn) (sent int) {
	message := wireguard(1, 148)
	for {
		select {
		case <-stop:
			return sent
		default:
		}
		binary.NativeEndian.PutUint32(message[4:], uint32(sent))
		if _, err := c.WriteToUDPAddrPort(message, netip.AddrPortFrom(underHere, floodPort)); err == nil {
			sent++
		}
	}
}

// TestFloodWireGuard: while an enemy floods, real WireGuard shakes hands through the guard and carries full packets, which
// are not padded to 16 bytes.
func TestFloodWireGuard(t *testing.T) {
	l := floodLab(t)
	probe := buildProbe(t)
	private, public := [2]string{}, [2]string{}
	for i := range private {
		k, err := ecdh.X25519().GenerateKey(rand.Reader)
		must(t, err, "make a key")
		private[i], public[i] = fmt.Sprintf("%x", k.Bytes()), fmt.Sprintf("%x", k.PublicKey().Bytes())
	}
	l.bareWireGuard(probe, "wgh0", "10.98.0.1/24", fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\nallowed_ip=10.98.0.2/32\n\n", private[0], floodPort, public[1]))
	f := l.guard(FloodConfig{PerSource: FloodRate{time.Hour, 50}}, "under0")
	must(t, f.SetKnown([]netip.Addr{underFar}), "set known addresses")

	enemy := l.udpFar(underEnemy)
	stop, sent := make(chan struct{}), 0
	var routineFlood sync.WaitGroup
	routineFlood.Go(func() { sent = floodUntil(stop, enemy) })
	l.inFar(func() {
		l.bareWireGuard(probe, "wgf0", "10.98.0.2/24", fmt.Sprintf("private_key=%s\npublic_key=%s\nendpoint=%v:%d\nallowed_ip=10.98.0.1/32\n\n", private[1], public[0], underHere, floodPort))
		// Full packets: 1392 bytes, 8 of ICMP and 20 of IP are the MTU.
		out, err := exec.Command("ping", "-M", "do", "-s", "1392", "-i", "0.2", "-c", "5", "-w", "15", "10.98.0.1").CombinedOutput()
		if err != nil {
			t.Errorf("ping through WireGuard during the flood: %v\n%s", err, out)
		}
	})
	close(stop)
	routineFlood.Wait()
	got, err := f.Counters()
	must(t, err, "counters")
	t.Logf("%d forged initiations sent; counted %+v", sent, got)
	if got.BadLength != 0 || got.BadType != 0 || got.RateGlobal != 0 {
		t.Errorf("WireGuard's own messages were dropped: %+v", got)
	}
	if sent < 1000 || got.RateSource < uint64(sent)/2 {
		t.Errorf("of %d initiations only %d were dropped", sent, got.RateSource)
	}
}

// buildProbe builds the program that runs WireGuard by itself.
func buildProbe(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("needs the go command to build integration/probe, which runs WireGuard without Signet")
	}
	path := filepath.Join(t.TempDir(), "probe")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "go", "build", "-o", path, "../../integration/probe").CombinedOutput()
	if err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	return path
}

// TestBenchFlood keeps the benchmark working; its figures are make bench's to judge, on a quieter machine.
func TestBenchFlood(t *testing.T) {
	needRoot(t)
	cost, err := BenchFlood()
	must(t, err, "bench")
	t.Logf("ns net of the harness: %+v", cost)
	if cost.Data > 1000 || cost.Initiation <= 0 || cost.Initiation > 5000 {
		t.Errorf("%+v are no sane figures", cost)
	}
}
