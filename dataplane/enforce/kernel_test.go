package enforce

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// TestSameHost: two workloads on one host talk over loopback, and are judged like any others.
func TestSameHost(t *testing.T) {
	l := newLab(t)
	e := l.open()
	a, b := l.start("a"), l.start("b")

	// Before the first view nothing passes.
	a.do("socket tcp4")
	a.want("EACCES", "connect 198.18.0.6:80")

	v := l.view()
	permit(v, 11, numA, numB, flow.TCP, 80)
	must(t, e.Apply(context.Background(), v), "apply")
	for _, c := range []struct{ kind, listen, target, from string }{
		{"tcp4", "0.0.0.0:80", "198.18.0.6:80", "198.18.0.5"},
		{"tcp6", "[::]:80", "[fd5a:7::6]:80", "fd5a:7::5"},
		{"tcp6", "[::]:80", "[::ffff:198.18.0.6]:80", "::ffff:198.18.0.5"},
	} {
		b.do("socket %s", c.kind)
		b.want("ok", "bind %s", c.listen)
		b.want("ok", "listen")
		a.do("socket %s", c.kind)
		a.want("inprogress", "connect %s", c.target)
		a.want("ok", "wait")
		b.want("from "+c.from, "accept")
		a.want("ok", "send hello")
		b.want("hello", "recv")
		b.want("ok", "send back")
		a.want("back", "recv")
		// The same from B to A, and on another port, is not allowed.
		b.do("socket %s", c.kind)
		b.want("EACCES", "connect %s", c.target[:len(c.target)-3]+":81")
	}
	// A process with raw sockets that pretends to be A reaches nobody.
	other := l.start("other")
	b.do("socket udp4")
	b.want("ok", "bind 198.18.0.6:80")
	other.do("socket raw4")
	other.want("EPERM", "rawsend 198.18.0.5:1000 198.18.0.6:80")
	other.do("socket packet")
	other.want("ENOBUFS", "rawsend 198.18.0.5:1000 198.18.0.6:80 1")
	b.want("ETIMEDOUT", "recv")
	if n := denied(t, e, policy.HookLoopback, flow.NoIdentity); n == 0 {
		t.Error("the forged packet on loopback was not counted")
	}
}

// openForDatagrams lets A and B send to UDP port 53 of the remote workload, and B to TCP port 443.
func (l *lab) openForDatagrams() *Enforcer {
	l.t.Helper()
	e := l.open()
	v := l.view()
	permit(v, 1, numA, numRemote, flow.UDP, 53)
	permit(v, 2, numB, numRemote, flow.UDP, 53)
	permit(v, 3, numB, numRemote, flow.TCP, 443)
	must(l.t, e.Apply(context.Background(), v), "apply")
	return e
}

// TestOwnSource: every kind of socket sends from its own workload's address, or not at all.
func TestOwnSource(t *testing.T) {
	l := newLab(t)
	l.openForDatagrams()
	a, b, other := l.start("a"), l.start("b"), l.start("other")

	// B's own traffic has B's address, though A's is the device's first. Each family, each kind of socket.
	for _, kind := range []string{"tcp4", "mptcp4"} {
		b.do("socket %s", kind)
		b.want("inprogress", "connect 198.18.1.9:443")
		l.sent(kind, b4, 443)
	}
	b.do("socket tcp6")
	b.want("inprogress", "connect [fd5a:7::1:9]:443")
	l.sent("tcp6", b6, 443)
	b.do("socket tcp6")
	b.want("inprogress", "connect [::ffff:198.18.1.9]:443")
	l.sent("mapped tcp", b4, 443)
	for _, c := range []struct {
		kind, to string
		from     netip.Addr
	}{{"udp4", "198.18.1.9:53", b4}, {"udp6", "[fd5a:7::1:9]:53", b6}, {"udp6", "[::ffff:198.18.1.9]:53", b4}} {
		b.do("socket %s", c.kind)
		b.want("ok", "sendto %s x", c.to)
		l.sent("unconnected "+c.kind, c.from, 53)
		b.do("socket %s", c.kind)
		b.want("ok", "connect %s", c.to)
		b.want("ok", "send x")
		l.sent("connected "+c.kind, c.from, 53)
	}

	// Nobody is nobody; and A has no rule for TCP.
	other.do("socket tcp4")
	other.want("EACCES", "connect 198.18.1.9:443")
	a.do("socket tcp4")
	a.want("EACCES", "connect 198.18.1.9:443")
	other.do("socket udp6")
	other.want("EACCES", "sendto [::ffff:198.18.1.9]:53 x")

	// A process deeper in A's cgroup is A.
	deep := l.start("a/deep")
	deep.do("socket udp4")
	deep.want("ok", "sendto 198.18.1.9:53 x")
	l.sent("nested cgroup", a4, 53)
}

// TestSpoofing runs the rows of the spoofing matrix: what a process sends with an address that is not its own.
func TestSpoofing(t *testing.T) {
	l := newLab(t)
	e := l.openForDatagrams()
	a, other := l.start("a"), l.start("other")

	// Binding another's address, in every way.
	for _, c := range []struct{ kind, addr string }{
		{"tcp4", "198.18.0.6:0"}, {"udp4", "198.18.0.6:0"}, {"tcp6", "[fd5a:7::6]:0"}, {"tcp6", "[::ffff:198.18.0.6]:0"}, {"udp6", "[::ffff:198.18.0.6]:0"},
	} {
		a.do("socket %s", c.kind)
		a.want("EPERM", "bind %s", c.addr)
	}
	a.do("socket udp4")
	a.want("ok", "freebind")
	a.want("EPERM", "bind 198.18.0.77:0")
	a.do("socket udp4")
	a.want("ok", "bind 198.18.0.5:0")
	// A source in ancillary data, with and without a connection.
	a.do("socket udp4")
	a.want("EACCES", "sendfrom 198.18.0.6 198.18.1.9:53")
	a.want("ok", "sendfrom 198.18.0.5 198.18.1.9:53")
	l.sent("own ancillary source", a4, 53)
	a.do("socket udp4")
	a.want("ok", "connect 198.18.1.9:53")
	a.want("EACCES", "sendfrom 198.18.0.6 -")
	a.do("socket udp6")
	a.want("EACCES", "sendfrom fd5a:7::6 [fd5a:7::1:9]:53")
	// A port without an address cannot be given one.
	a.do("socket udp4")
	a.want("ok", "bind 0.0.0.0:7777")
	a.want("EACCES", "connect 198.18.1.9:53")
	// Headers of one's own making; packet sockets see only the device's judge.
	before := denied(t, e, policy.HookEgressDevice, flow.NoIdentity)
	other.do("socket raw4")
	other.want("EPERM", "rawsend 198.18.0.5:1000 198.18.1.9:53")
	a.do("socket raw4")
	a.want("EPERM", "rawsend 198.18.0.6:1000 198.18.1.9:53")
	other.do("socket packet")
	other.do("rawsend 198.18.0.5:1000 198.18.1.9:53 %d", l.tunnel)
	other.do("rawsend [fd5a:7::5]:1000 [fd5a:7::1:9]:53 %d", l.tunnel)
	l.silent("forged headers")
	if n := denied(t, e, policy.HookEgressDevice, flow.NoIdentity) - before; n != 2 {
		t.Errorf("%d packets of packet sockets were counted as denied, want 2", n)
	}
}

// TestSourceDoesNotStick: after a connection to the overlay, the same socket calls the underlay from the underlay.
func TestSourceDoesNotStick(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 1, numA, numRemote, flow.UDP, 53)
	must(t, e.Apply(context.Background(), v), "apply")
	a := l.start("a")
	for _, c := range []struct{ kind, overlay, own, under, want string }{
		{"udp4", "198.18.1.9:53", "198.18.0.5", "10.99.0.2:53", "10.99.0.1"},
		{"udp6", "[::ffff:198.18.1.9]:53", "::ffff:198.18.0.5", "[::ffff:10.99.0.2]:53", "::ffff:10.99.0.1"},
	} {
		a.do("socket %s", c.kind)
		a.want("ok", "connect %s", c.overlay)
		a.want(c.own, "name")
		a.want("ok", "unspec")
		a.want("ok", "connect %s", c.under)
		a.want(c.want, "name")
		a.want("ok", "unspec")
		a.want("ok", "connect %s", c.overlay)
		a.want(c.own, "name")
	}
	// The underlay itself is none of our business, and the overlay does not leave by it.
	a.do("socket udp4")
	a.want("ok", "sendto 10.99.0.2:9 x")
	a.do("socket udp4")
	a.want("ok", "device under0")
	a.want("EPERM", "sendto 198.18.1.9:53 x")
	if n := denied(t, e, policy.HookEgressSocket, flow.NotTunnel); n != 1 {
		t.Errorf("%d packets were counted as leaving by the underlay, want 1", n)
	}
}

// TestQueueBypass: no process below the root gets a socket whose packets skip the judge at the tunnel.
func TestQueueBypass(t *testing.T) {
	l := newLab(t)
	e := l.open()
	const (
		bypass = "263 20" // SOL_PACKET, PACKET_QDISC_BYPASS
		umem   = "283 4"  // SOL_XDP, XDP_UMEM_REG
	)
	for _, cgroup := range []string{"a", "a/deep", "other"} {
		p := l.start(cgroup)
		p.do("socket packet")
		p.want("EPERM", "option %s", bypass)
		p.do("rawsend 198.18.0.5:1000 198.18.1.9:53 %d", l.tunnel)
		p.want("ok", "option 263 8") // PACKET_AUXDATA: other options are nobody's business
		if p.do("socket xdp") == "ok" {
			p.want("EPERM", "option %s", umem)
		} else {
			t.Log("this kernel has no AF_XDP")
		}
		// Long options, such as those of iptables, pass as they are.
		p.do("socket udp4")
		p.want("ok", "option 0 1 8192") // IP_TOS
		p.want("ok", "option 0 1")
	}
	l.silent("a packet socket")

	// A kernel that has no such hook is told, and judges all the same.
	delete(e.coll.Programs, hookSetsockopt)
	must(t, e.drop(hookSetsockopt), "detach")
	must(t, e.attachCgroup(), "attach without it")
	if err := hookErr(t, e, hookSetsockopt); !errors.Is(err, errNoProgram) {
		t.Errorf("got %v, want errNoProgram", err)
	}
	p := l.start("other")
	p.do("socket packet")
	p.eventually("ok", "option "+bypass) // the kernel frees a link a moment after its last pin
}

// TestReceivers: who gets what arrives by the tunnel, and from where it is answered.
func TestReceivers(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 1, numRemote, numA, flow.TCP, 8080)
	permit(v, 2, numRemote, numB, flow.UDP, 5000)
	must(t, e.Apply(context.Background(), v), "apply")
	a, b, other := l.start("a"), l.start("b"), l.start("other")
	port := uint16(40000)
	syn := func() {
		port++
		src, dst := netip.AddrPortFrom(remote4, port), netip.AddrPortFrom(a4, 8080)
		l.inject(ipPacket(src, dst, protoTCP, tcpHeader(src, dst, policy.FlagSYN, 1, 0)))
	}
	flagsOf := func(p []byte) uint8 {
		if p == nil {
			return 0
		}
		return p[33]
	}

	// Nobody listens: the kernel refuses, as a reply to what is tracked.
	syn()
	if f := flagsOf(l.sent("reset", a4, port)); f&policy.FlagRST == 0 {
		t.Errorf("flags %#x, want a reset", f)
	}
	for _, c := range []struct {
		who    *proc
		reason flow.Reason
	}{{other, flow.NoIdentity}, {b, flow.WrongReceiver}} {
		c.who.do("socket tcp4")
		c.who.want("ok", "bind 0.0.0.0:8080")
		c.who.want("ok", "listen")
		syn()
		l.silent("a listener of another's")
		c.who.want("ETIMEDOUT", "accept")
		if n := denied(t, e, policy.HookIngressSocket, c.reason); n == 0 {
			t.Errorf("%v was not counted", c.reason)
		}
		c.who.do("socket udp4") // closes the listener
	}
	a.do("socket tcp4")
	a.want("ok", "bind 0.0.0.0:8080")
	a.want("ok", "listen")
	syn()
	if f := flagsOf(l.sent("answer", a4, port)); f != policy.FlagSYN|policy.FlagACK {
		t.Errorf("flags %#x, want an answer", f)
	}
	// A server on the wildcard address answers from the address that was asked, without a rule of its own.
	b.do("socket udp4")
	b.want("ok", "bind 0.0.0.0:5000")
	src, dst := netip.AddrPortFrom(remote4, 4000), netip.AddrPortFrom(b4, 5000)
	l.inject(ipPacket(src, dst, protoUDP, udpHeader(src, dst, "question")))
	b.want("question from 198.18.1.9:4000", "recv")
	b.want("ok", "sendto 198.18.1.9:4000 answer")
	l.sent("datagram answer", b4, 4000)
	b.want("EACCES", "sendto 198.18.1.9:4001 answer")
}

// TestPings: the kernel answers pings that are allowed, and no others.
func TestPings(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 3, numRemote, numA, flow.ICMP, 0)
	must(t, e.Apply(context.Background(), v), "apply")
	for _, c := range []struct{ from, to netip.Addr }{{remote4, a4}, {remote6, a6}} {
		src, dst := netip.AddrPortFrom(c.from, 9), netip.AddrPortFrom(c.to, 9)
		proto := uint8(protoICMP)
		if c.to.Is6() {
			proto = protoICMPv6
		}
		l.inject(ipPacket(src, dst, proto, icmpEcho(src, dst, true)))
		if l.wire(helperWait, func(p []byte) bool { return sourceOf(p) == c.to }) == nil {
			t.Errorf("ping of %v was not answered", c.to)
		}
	}
	src, dst := netip.AddrPortFrom(remote4, 9), netip.AddrPortFrom(b4, 9)
	l.inject(ipPacket(src, dst, protoICMP, icmpEcho(src, dst, true)))
	l.silent("a ping that is not allowed")
}

// TestGuard: overlay addresses neither arrive nor leave by the underlay.
func TestGuard(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 1, numRemote, numA, flow.UDP, 5000)
	must(t, e.Apply(context.Background(), v), "apply")
	must(t, os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("0"), 0), "weak host")
	must(t, os.WriteFile("/proc/sys/net/ipv4/conf/under0/rp_filter", []byte("0"), 0), "weak host")
	a, far := l.start("a"), l.startFar()
	a.do("socket udp4")
	a.want("ok", "bind 198.18.0.5:5000")
	src, dst := netip.AddrPortFrom(remote4, 4000), netip.AddrPortFrom(a4, 5000)
	l.inject(ipPacket(src, dst, protoUDP, udpHeader(src, dst, "good")))
	a.want("good from 198.18.1.9:4000", "recv")

	var farIndex int
	l.inFar(func() { farIndex = l.index("far0") })
	far.do("socket packet")
	for _, from := range []string{"198.18.1.9:4000", "10.99.0.2:4000"} {
		far.want("ok", "rawsend %s 198.18.0.5:5000 %d", from, farIndex)
	}
	a.want("ETIMEDOUT", "recv")
	if n := denied(t, e, policy.HookGuard, flow.NotTunnel); n != 2 {
		t.Errorf("%d packets in clear were counted on arrival, want 2", n)
	}
	// Out: a packet socket on the underlay device, which no socket hook sees.
	other := l.start("other")
	other.do("socket packet")
	other.do("rawsend 198.18.0.5:1 198.18.1.9:53 %d", l.veth)
	other.do("rawsend [fd5a:7::5]:1 [fd5a:7::1:9]:53 %d", l.veth)
	other.do("rawsend 10.99.0.1:1 198.18.1.9:53 %d", l.veth)
	if n := denied(t, e, policy.HookGuard, flow.NotTunnel); n != 5 {
		t.Errorf("%d packets in clear were counted both ways, want 5", n)
	}
	// A device that appears later is guarded when it is named; asking again changes nothing; and it can go.
	l.ip("link add late0 type veth peer name late1")
	late := l.index("late0")
	for range 2 {
		must(t, e.AttachGuard(late, "late0"), "guard")
	}
	l.ip("link del late0")
	for range 2 {
		must(t, e.DetachGuard(late), "forget")
	}
	if err := e.AttachTunnel(l.veth); err == nil {
		t.Error("an Ethernet device was taken for the tunnel")
	}
}

// TestHandover: enforcement outlives the agent, and a successor takes over without a gap. A rogue peer sends forbidden
// datagrams all the while; none arrives. What is allowed arrives in every cycle.
func TestHandover(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 1, numRemote, numA, flow.UDP, 5000)
	must(t, e.Apply(context.Background(), v), "apply")
	good, bad := l.start("a"), l.start("b")
	good.do("socket udp4")
	good.want("ok", "bind 198.18.0.5:5000")
	bad.do("socket udp4")
	bad.want("ok", "bind 198.18.0.6:5000")

	var stop atomic.Bool
	var sent atomic.Int64
	done := make(chan struct{})
	src, dst := netip.AddrPortFrom(remote4, 4000), netip.AddrPortFrom(b4, 5000)
	forbidden := ipPacket(src, dst, protoUDP, udpHeader(src, dst, "bad"))
	go func() {
		defer close(done)
		for !stop.Load() {
			if _, err := unix.Write(l.tun, forbidden); err == nil {
				sent.Add(1)
			}
		}
	}()
	const cycles = 20
	var slowest time.Duration
	for cycle := range cycles {
		must(t, e.Close(), "close")
		dst := netip.AddrPortFrom(a4, 5000)
		hello := ipPacket(src, dst, protoUDP, udpHeader(src, dst, "good"))
		l.inject(hello)
		good.want("good from 198.18.1.9:4000", "recv")
		began := time.Now()
		next, err := Open(l.cfg)
		must(t, err, "open again")
		slowest = max(slowest, time.Since(began))
		e = next
		must(t, e.AttachTunnel(l.tunnel), "attach again")
		v := l.view()
		v.Revision = uint64(cycle)
		permit(v, 1, numRemote, numA, flow.UDP, 5000)
		must(t, e.Apply(context.Background(), v), "apply again")
		l.inject(hello)
		good.want("good from 198.18.1.9:4000", "recv")
	}
	stop.Store(true)
	<-done
	bad.want("ETIMEDOUT", "recv")
	n := denied(t, e, policy.HookIngressDevice, flow.NoRule)
	if s := uint64(sent.Load()); n != s {
		t.Errorf("%d forbidden packets were sent and %d counted as denied", s, n)
	}
	t.Logf("%d forbidden packets, none delivered, over %d handovers; the slowest open took %v", sent.Load(), cycles, slowest)

	// Down: everything is taken back and nothing passes, though the hooks stay.
	must(t, e.DenyAll(), "deny all")
	dst = netip.AddrPortFrom(a4, 5000)
	l.inject(ipPacket(src, dst, protoUDP, udpHeader(src, dst, "good")))
	good.want("ETIMEDOUT", "recv")
	must(t, e.Close(), "close")
	must(t, Release(l.cfg), "release")
	if _, err := os.Stat(l.cfg.pins()); !os.IsNotExist(err) {
		t.Errorf("pins are left: %v", err)
	}
	bad.do("socket udp4")
	bad.eventually("ok", "bind 198.18.0.5:5001") // the kernel frees a link a moment after its last pin
}

// TestRevocation: a rule that is taken back stops both directions at once, and a new one needs no new connection.
func TestRevocation(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 1, numA, numB, flow.UDP, 80)
	must(t, e.Apply(context.Background(), v), "apply")
	a, b := l.start("a"), l.start("b")
	b.do("socket udp4")
	b.want("ok", "bind 198.18.0.6:80")
	a.do("socket udp4")
	a.want("ok", "bind 198.18.0.5:1000")
	a.want("ok", "connect 198.18.0.6:80")
	a.want("ok", "send one")
	b.want("one from 198.18.0.5:1000", "recv")
	b.want("ok", "connect 198.18.0.5:1000") // an answer, so no rule of its own is needed
	must(t, e.Apply(context.Background(), l.view()), "take back")
	a.want("EPERM", "send two")
	b.want("EPERM", "send back")
	v = l.view()
	permit(v, 5, numA, numB, flow.UDP, 80)
	must(t, e.Apply(context.Background(), v), "allow again")
	a.want("ok", "send three")
	b.want("three from 198.18.0.5:1000", "recv")
	b.want("ok", "send back")
	a.want("back from 198.18.0.6:80", "recv")
	if got := e.View(); got.Generation != e.Generation() || got.Generation < 3 {
		t.Errorf("generation %d of the view, %d in force", got.Generation, e.Generation())
	}
}

// TestEvents: denials, beginnings and ends are told with who and why.
func TestEvents(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 11, numA, numB, flow.UDP, 80)
	must(t, e.Apply(context.Background(), v), "apply")
	events := make(chan Event, 64)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.Events(ctx, func(ev Event) { events <- ev }) }()
	next := func() Event {
		t.Helper()
		select {
		case ev := <-events:
			return ev
		case <-time.After(helperWait):
			t.Fatal("no event came")
		}
		return Event{}
	}
	a := l.start("a")
	a.do("socket udp4")
	a.want("EACCES", "sendto 198.18.0.6:81 x")
	ev := next()
	if ev.Kind != EventDeny || ev.Reason != flow.NoRule || ev.Src != numA || ev.Dst != numB || ev.Tuple.Dst.Port() != 81 ||
		ev.Local.Cgroup != l.ids["a"] || ev.Local.PID == 0 || ev.View.Revision != 7 || time.Since(ev.Time).Abs() > time.Minute {
		t.Errorf("denial: %+v", ev)
	}
	a.want("ok", "sendto 198.18.0.6:80 x")
	ev = next()
	if ev.Kind != EventStart || ev.Rule != 11 || ev.Verdict != flow.Allow || ev.Tuple.Src.Addr() != a4 || ev.Tuple.Dst.Addr() != b4 {
		t.Errorf("beginning: %+v", ev)
	}
	flows, err := e.Flows(0)
	must(t, err, "flows")
	if len(flows) != 1 || flows[0].ID != ev.Flow || flows[0].Sent != (Traffic{Packets: 1, Bytes: 29}) || flows[0].Src != numA {
		t.Errorf("flows: %+v", flows)
	}
	must(t, e.DenyAll(), "deny all")
	a.do("sendto 198.18.0.6:80 x")
	if ev = next(); ev.Kind != EventDeny {
		t.Errorf("denial: %+v", ev)
	}
	cancel()
	must(t, <-ended, "events")
}
