package session

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLimiter(t *testing.T) {
	now := time.Unix(1_790_000_000, 0)
	l := newLimiter(10, 5)
	a := netip.MustParseAddr("192.0.2.1")
	for i := range 6 {
		if l.allow(a, now) != (i < 5) {
			t.Fatalf("call %d", i)
		}
	}
	if !l.allow(netip.MustParseAddr("192.0.2.2"), now) {
		t.Error("one address used up another's share")
	}
	if !l.allow(a, now.Add(100*time.Millisecond)) || l.allow(a, now.Add(100*time.Millisecond)) {
		t.Error("a tenth of a second brings one of ten")
	}
	if l.allow(a, now.Add(-time.Hour)) {
		t.Error("a clock that goes back brings nothing")
	}
	v6 := netip.MustParseAddr("2001:db8::1")
	for range 5 {
		l.allow(v6, now)
	}
	if l.allow(netip.MustParseAddr("2001:db8::2"), now) || !l.allow(netip.MustParseAddr("2001:db8:0:1::1"), now) {
		t.Error("one IPv6 /64 is one source")
	}
	if l.allow(netip.MustParseAddr("::ffff:192.0.2.1"), now) {
		t.Error("a mapped address is the same source")
	}
}

func TestLimiterTableIsBounded(t *testing.T) {
	now := time.Unix(1_790_000_000, 0)
	l := newLimiter(1, 2)
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}) }
	for i := range 3 * maxSources {
		l.allow(addr(i), now)
	}
	if len(l.sources) != maxSources {
		t.Errorf("%d buckets", len(l.sources))
	}
	if l.allow(addr(3*maxSources), now) {
		t.Error("the overflow bucket is endless")
	}
	if !l.allow(addr(0), now) {
		t.Error("a known source lost its bucket")
	}
	if later := now.Add(time.Hour); !l.allow(addr(4*maxSources), later) || len(l.sources) > maxSources {
		t.Errorf("idle buckets do not make room: %d", len(l.sources))
	}
}

func TestCandidates(t *testing.T) {
	ap := netip.MustParseAddrPort
	many := make([]netip.AddrPort, maxEndpoints)
	for i := range many {
		many[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), 1)
	}
	seen := netip.MustParseAddr("198.51.100.9")
	for name, c := range map[string]struct {
		reported []netip.AddrPort
		seen     netip.Addr
		port     uint16
		want     []netip.AddrPort
	}{
		"own first":           {[]netip.AddrPort{ap("10.0.0.1:1")}, seen, 51820, []netip.AddrPort{ap("10.0.0.1:1"), ap("198.51.100.9:51820")}},
		"not twice":           {[]netip.AddrPort{ap("198.51.100.9:51820")}, seen, 51820, []netip.AddrPort{ap("198.51.100.9:51820")}},
		"mapped":              {nil, netip.MustParseAddr("::ffff:198.51.100.9"), 5, []netip.AddrPort{ap("198.51.100.9:5")}},
		"loopback alone":      {nil, netip.MustParseAddr("127.0.0.1"), 5, []netip.AddrPort{ap("127.0.0.1:5")}},
		"loopback with other": {[]netip.AddrPort{ap("10.0.0.1:1")}, netip.MustParseAddr("127.0.0.1"), 5, []netip.AddrPort{ap("10.0.0.1:1")}},
		"no port":             {nil, seen, 0, nil},
		"unknown":             {nil, netip.Addr{}, 5, nil},
		"bounded":             {many, seen, 5, append(slices.Clone(many[:maxEndpoints-1]), ap("198.51.100.9:5"))},
	} {
		if got := candidates(c.reported, c.seen, c.port); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, expected %v", name, got, c.want)
		}
	}
}

func TestDirectoryTellsOnlyNews(t *testing.T) {
	d := directory{nodes: map[string]place{}}
	one := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:1")}
	d.set("a", one)
	d.set("b", one)
	if d.set("a", slices.Clone(one)) {
		t.Error("the same endpoints are no change")
	}
	peers := []string{"a", "b"}
	got, at := d.since(peers, 0, nil)
	if len(got) != 2 {
		t.Fatalf("%v", got)
	}
	if got, _ := d.since(peers, at, peers); got != nil {
		t.Errorf("nothing changed, told %v", got)
	}
	d.set("b", nil)
	d.set("c", one)
	if got, _ = d.since(peers, at, peers); len(got) != 1 || got[0].Node != "b" || len(got[0].Endpoints) != 0 {
		t.Errorf("told %v, expected that b has none any more", got)
	}
	if got, _ = d.since([]string{"a", "b", "c"}, d.version, peers); len(got) != 1 || got[0].Node != "c" {
		t.Errorf("a new peer: told %v", got)
	}
	if d.forget("a"); d.of("a") != nil {
		t.Error("a forgotten node has endpoints")
	}
}

func TestPlain(t *testing.T) {
	if got := plain("a\nb\x1b[31m\xffé" + strings.Repeat("x", 2*maxReportError)); strings.ContainsAny(got, "\n\x1b") || len(got) > maxReportError || !strings.HasPrefix(got, "a b [31mé") {
		t.Errorf("%q", got)
	}
}

func TestBoundedListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newBounded(inner, 1)
	var clients []net.Conn
	for range 2 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan net.Conn)
	go func() {
		c, _ := l.Accept()
		second <- c
	}()
	select {
	case <-second:
		t.Fatal("a second connection was accepted")
	case <-time.After(20 * time.Millisecond):
	}
	_ = first.Close()
	_ = first.Close() // gives no second slot
	c := <-second
	waiting := make(chan error)
	go func() {
		_, err := l.Accept()
		waiting <- err
	}()
	var wg sync.WaitGroup
	wg.Go(func() { _ = l.Close() })
	if err := <-waiting; err == nil {
		t.Error("Accept after Close")
	}
	wg.Wait()
	_ = l.Close()
	_ = c.Close()
	for _, c := range clients {
		_ = c.Close()
	}
}

func TestOneSourceGetsItsShareOfConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newBounded(inner, 400)
	defer l.Close()
	if n := newBounded(inner, 30_000).perSource; n < 1000 || n > 7500 {
		t.Errorf("%d for one source of 30,000", n)
	}
	accepted := make(chan net.Conn, 400)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func(from string) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	var held []net.Conn
	for range 100 {
		dial("127.0.0.1")
		held = append(held, <-accepted)
	}
	over := dial("127.0.0.1")
	_ = over.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := over.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection above the share: %v", err)
	}
	dial("127.0.0.2") // another source is not concerned
	held = append(held, <-accepted)
	_ = held[0].Close()
	_ = held[0].Close() // gives no second place
	dial("127.0.0.1")
	held = append(held, <-accepted)
	for _, c := range held {
		_ = c.Close()
	}
	if len(l.bySource) != 0 || len(l.slots) != 1 { // the next Accept holds one
		t.Errorf("left: %v, %d slots", l.bySource, len(l.slots))
	}
}

func TestSoonest(t *testing.T) {
	for _, c := range [][3]time.Duration{{0, 0, sendTimeout}, {0, 5, 5}, {4, 0, 4}, {4, 5, 4}} {
		if got := soonest(c[0], c[1]); got != c[2] {
			t.Errorf("soonest(%v, %v) = %v", c[0], c[1], got)
		}
	}
}
