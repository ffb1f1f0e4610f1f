package enforce

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
)

// floodTwin says, slowly and obviously, what the guard should do. Its buckets never fill up again: the tests give rates of
// one token an hour.
type floodTwin struct {
	port   uint16
	own    map[netip.Addr]bool
	known  map[netip.Addr]int // tokens left
	left   map[netip.Addr]int // tokens left of an unknown source
	burst  int                // of an unknown source
	global int                // tokens left
}

// floodNone is the cause of packets that are none of the guard's business.
const floodNone = -1

// network finds the IP packet behind an Ethernet header and tags.
func (*floodTwin) network(frame []byte) (kind uint16, packet []byte) {
	kind, packet = binary.BigEndian.Uint16(frame[12:]), frame[14:]
	for tags := 0; tags < 2 && (kind == unix.ETH_P_8021Q || kind == unix.ETH_P_8021AD) && len(packet) >= 4; tags++ {
		kind, packet = binary.BigEndian.Uint16(packet[2:]), packet[4:]
	}
	return kind, packet
}

// transport finds the UDP header, or nothing.
func (*floodTwin) transport(kind uint16, p []byte) (src, dst netip.Addr, udp []byte) {
	switch {
	case kind == unix.ETH_P_IP && len(p) >= 20 && p[0]>>4 == 4 && p[0]&15 >= 5 && p[9] == protoUDP:
		if whole := binary.BigEndian.Uint16(p[6:])&0x3fff == 0; !whole || len(p) < int(p[0]&15)*4 {
			return
		}
		return netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:])), p[int(p[0]&15)*4:]
	case kind == unix.ETH_P_IPV6 && len(p) >= 40 && p[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
		if src.Is4In6() || dst.Is4In6() {
			return
		}
		next, rest := p[6], p[40:]
		for range 6 {
			isExtension := next == 0 || next == 60 || next == 43
			if !isExtension || len(rest) < 4 || next == 43 && rest[3] != 0 {
				break
			}
			n := (int(rest[1]) + 1) * 8
			next = rest[0]
			rest = rest[min(n, len(rest)):]
		}
		if next == protoUDP {
			return src, dst, rest
		}
	}
	return
}

func (*floodTwin) form(message []byte, length int) int {
	if length < 4 {
		return bpf.FloodBadLength
	}
	lengths := map[uint32]int{1: 148, 2: 92, 3: 64}
	word := binary.LittleEndian.Uint32(message)
	if want, ok := lengths[word]; ok && length == want || word == 4 && length >= 32 {
		return bpf.FloodPassed
	} else if ok || word == 4 {
		return bpf.FloodBadLength
	}
	return bpf.FloodBadType
}

func (m *floodTwin) pay(src netip.Addr) int {
	if n, ok := m.known[src]; ok {
		if n == 0 {
			return bpf.FloodRateSource
		}
		m.known[src]--
		return bpf.FloodPassed
	}
	bits := 32
	if src.Is6() {
		bits = 64
	}
	p, _ := src.Prefix(bits)
	if _, ok := m.left[p.Addr()]; !ok {
		m.left[p.Addr()] = m.burst
	}
	if m.left[p.Addr()] == 0 {
		return bpf.FloodRateSource
	}
	m.left[p.Addr()]--
	if m.global == 0 {
		return bpf.FloodRateGlobal
	}
	m.global--
	return bpf.FloodPassed
}

// judge returns what is counted of a frame; it passes for floodNone and FloodPassed.
func (m *floodTwin) judge(frame []byte) int {
	kind, packet := m.network(frame)
	src, dst, udp := m.transport(kind, packet)
	if len(udp) < 8 || binary.BigEndian.Uint16(udp[2:]) != m.port {
		return floodNone
	}
	length := int(binary.BigEndian.Uint16(udp[4:])) - 8
	if length < 0 || length >= 4 && len(udp) < 12 {
		return floodNone
	}
	cause := m.form(udp[8:], length)
	initiation := cause == bpf.FloodPassed && udp[8] == 1
	if cause == bpf.FloodPassed && !initiation {
		return cause
	}
	if !m.own[dst] {
		return floodNone
	}
	if initiation {
		return m.pay(src)
	}
	return cause
}

// floodCause runs one entrance over a frame and says what it counted, after a look at whether that fits the verdict.
func floodCause(t testing.TB, f *Flood, program string, o ebpf.RunOptions) int {
	t.Helper()
	before, err := f.Counters()
	must(t, err, "counters")
	code, err := f.coll.Programs[program].Run(&o)
	must(t, err, "run "+program)
	after, err := f.Counters()
	must(t, err, "counters")
	cause := floodNone
	for i, n := range []uint64{
		after.Passed - before.Passed, after.BadLength - before.BadLength, after.BadType - before.BadType,
		after.RateSource - before.RateSource, after.RateGlobal - before.RateGlobal,
	} {
		if n > 0 && cause != floodNone {
			t.Errorf("%s counted two causes", program)
		} else if n > 0 {
			cause = i
		}
	}
	const pass, drop, next = 2, 1, -1 // of XDP, XDP, tcx
	const shot = 2                    // of tcx
	passed, dropped := int32(pass), int32(drop)
	if program != floodXDP {
		passed, dropped = next, shot
	}
	want := passed
	if cause > bpf.FloodPassed {
		want = dropped
	}
	if int32(code) != want {
		t.Errorf("%s returned %d and counted %d", program, int32(code), cause)
	}
	return cause
}

// testRunTakes: the harness refuses frames for tc that are too short for the IP header that they announce.
func testRunTakes(frame []byte) bool {
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		return len(frame) >= 14+20
	case unix.ETH_P_IPV6:
		return len(frame) >= 14+40
	}
	return len(frame) > 14
}

const (
	floodPort        = 51820
	fuzzSourceBurst  = 3
	fuzzGlobalBurst  = 2
	fuzzKnownBurst   = 4
	fuzzRuns         = 6
	fuzzFrameAtLeast = 14
	fuzzFrameAtMost  = 3000 // one buffer of the harness
)

var (
	floodHere4, floodHere6   = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	floodThere4, floodThere6 = netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:9:9::9")
	floodKnown4, floodKnown6 = netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("2001:db8:5:5::5")
)

func newFloodTwin() *floodTwin {
	return &floodTwin{
		port: floodPort, own: map[netip.Addr]bool{floodHere4: true, floodHere6: true},
		known: map[netip.Addr]int{floodKnown4: fuzzKnownBurst, floodKnown6: fuzzKnownBurst},
		left:  map[netip.Addr]int{}, burst: fuzzSourceBurst, global: fuzzGlobalBurst,
	}
}

// openFlood opens a guard with the twin's addresses and without devices.
func openFlood(t testing.TB, cfg FloodConfig) *Flood {
	t.Helper()
	cfg.Port = floodPort
	f, err := OpenFlood(cfg)
	must(t, err, "open the flood guard")
	t.Cleanup(func() { must(t, f.Close(), "close the flood guard") })
	must(t, f.SetOwn([]netip.Addr{floodHere4, floodHere6}), "set own addresses")
	must(t, f.SetKnown([]netip.Addr{floodKnown4, floodKnown6}), "set known addresses")
	return f
}

// fillBuckets makes every bucket full again.
func fillBuckets(t testing.TB, f *Flood) {
	t.Helper()
	must(t, f.coll.Maps[mapFloodGlobal].Put(uint32(0), uint64(0)), "fill the common bucket")
	for _, name := range []string{mapFloodSources, mapFloodKnown} {
		var key [16]byte
		var value uint64
		var keys [][16]byte
		it := f.coll.Maps[name].Iterate()
		for it.Next(&key, &value) {
			keys = append(keys, key)
		}
		must(t, it.Err(), "list buckets")
		for _, k := range keys {
			must(t, f.coll.Maps[name].Put(k, uint64(0)), "fill a bucket")
		}
	}
}

// FuzzFlood gives both entrances any frame, several times over, and compares with the twin what they do and count.
func FuzzFlood(f *testing.F) {
	if testing.Short() {
		f.Skip("runs packets through the loaded programs: left out of -short")
	}
	needRootFuzz(f)
	cfg := FloodConfig{
		PerSource:  FloodRate{maxFloodEvery, fuzzSourceBurst},
		Known:      FloodRate{maxFloodEvery, fuzzKnownBurst},
		Global:     FloodRate{maxFloodEvery, fuzzGlobalBurst},
		MaxSources: 64, // so that filling all buckets again is quick
	}
	guard := openFlood(f, cfg)
	for _, c := range floodCases() {
		f.Add(c.frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < fuzzFrameAtLeast || len(frame) > fuzzFrameAtMost {
			return
		}
		for _, program := range []string{floodXDP, floodEther} {
			if program != floodXDP && !testRunTakes(frame) {
				continue
			}
			fillBuckets(t, guard)
			twin := newFloodTwin()
			for i := range fuzzRuns {
				want := twin.judge(frame)
				if got := floodCause(t, guard, program, ebpf.RunOptions{Data: frame}); got != want {
					t.Fatalf("%s, run %d: %d, the twin says %d", program, i, got, want)
				}
				if want <= bpf.FloodBadType && i > 0 && len(twin.left) == 0 && twin.known[floodKnown4]+twin.known[floodKnown6] == 2*fuzzKnownBurst {
					break // nothing was paid, so that more of the same says nothing
				}
			}
		}
	})
}
