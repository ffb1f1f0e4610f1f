package enforce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
)

// wireguard is a message of a type, as long as told; it may be shorter than a message's first word.
func wireguard(kind uint32, length int) []byte {
	b := make([]byte, max(length, 4))
	binary.LittleEndian.PutUint32(b, kind)
	return b[:length]
}

// floodUDP is an IP packet with a message, to WireGuard's port.
func floodUDP(src, dst netip.Addr, message []byte) []byte {
	s, d := netip.AddrPortFrom(src, 40000), netip.AddrPortFrom(dst, floodPort)
	return ipPacket(s, d, protoUDP, udpHeader(s, d, string(message)))
}

// floodFrame puts Ethernet and tags in front of an IP packet.
func floodFrame(packet []byte, tags ...uint16) []byte {
	b := make([]byte, 12, 64+len(packet))
	for _, kind := range tags {
		b = append(b, byte(kind>>8), byte(kind), 0, 7)
	}
	if packet[0]>>4 == 4 {
		b = append(b, 0x08, 0x00)
	} else {
		b = append(b, 0x86, 0xdd)
	}
	return append(b, packet...)
}

// options puts words of IPv4 options behind the header.
func options(packet []byte, words int) []byte {
	b := slices.Concat(packet[:20], bytes.Repeat([]byte{1}, words*4), packet[20:])
	b[0] += byte(words)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	return b
}

// arrived is extend with routing headers that have no stops left.
func arrived(packet []byte, kinds ...uint8) []byte {
	b := extend(packet, kinds...)
	for i, kind := range kinds {
		if kind == 43 {
			b[40+8*i+3] = 0
		}
	}
	return b
}

// with changes one byte.
func with(b []byte, at int, v byte) []byte {
	b = bytes.Clone(b)
	b[at] = v
	return b
}

type floodCase struct {
	name  string
	frame []byte
	want  int
}

// floodLengths has each type at its boundaries.
func floodLengths() (out []floodCase) {
	for kind, lengths := range map[uint32]map[int]int{
		1: {147: bpf.FloodBadLength, 148: bpf.FloodPassed, 149: bpf.FloodBadLength, 4: bpf.FloodBadLength},
		2: {91: bpf.FloodBadLength, 92: bpf.FloodPassed, 93: bpf.FloodBadLength, 148: bpf.FloodBadLength},
		3: {63: bpf.FloodBadLength, 64: bpf.FloodPassed, 65: bpf.FloodBadLength},
		// 1452 is a full packet of a device with an MTU of 1420, which WireGuard does not pad to 16 bytes.
		4:         {31: bpf.FloodBadLength, 32: bpf.FloodPassed, 33: bpf.FloodPassed, 48: bpf.FloodPassed, 148: bpf.FloodPassed, 1452: bpf.FloodPassed},
		0:         {0: bpf.FloodBadLength, 3: bpf.FloodBadLength, 4: bpf.FloodBadType, 148: bpf.FloodBadType},
		5:         {32: bpf.FloodBadType, 148: bpf.FloodBadType},
		255:       {148: bpf.FloodBadType},
		1<<8 | 1:  {148: bpf.FloodBadType},
		1<<16 | 2: {92: bpf.FloodBadType},
		1<<24 | 4: {32: bpf.FloodBadType},
		1 << 24:   {148: bpf.FloodBadType},
	} {
		for n, want := range lengths {
			for _, ends := range [][2]netip.Addr{{floodThere4, floodHere4}, {floodThere6, floodHere6}} {
				out = append(out, floodCase{fmt.Sprintf("type %#x, %d bytes, to %v", kind, n, ends[1]), floodFrame(floodUDP(ends[0], ends[1], wireguard(kind, n))), want})
			}
		}
	}
	return out
}

// floodCases is the table of packets. A message of type 9 is dropped wherever the guard can see it, so it shows where it
// does.
//
//house:allow-long a table of packets
func floodCases() []floodCase {
	const c8021Q, c8021AD = unix.ETH_P_8021Q, unix.ETH_P_8021AD
	bad := wireguard(9, 64)
	v4, v6 := floodUDP(floodThere4, floodHere4, bad), floodUDP(floodThere6, floodHere6, bad)
	port := func(p []byte, at int) []byte { return with(p, at, p[at]+1) }
	dst6 := func(p []byte, kinds ...uint8) []byte { return floodFrame(arrived(p, kinds...)) }
	segmentsLeft := with(extend(v6, 43), 40+3, 1)
	long := extend(v6, 60)
	long = slices.Concat(long[:48], make([]byte, 64), long[48:])
	long[41] = 8
	return append(floodLengths(),
		floodCase{"IPv4", floodFrame(v4), bpf.FloodBadType},
		floodCase{"IPv6", floodFrame(v6), bpf.FloodBadType},
		floodCase{"one tag", floodFrame(v4, c8021Q), bpf.FloodBadType},
		floodCase{"one service tag", floodFrame(v6, c8021AD), bpf.FloodBadType},
		floodCase{"two tags", floodFrame(v4, c8021AD, c8021Q), bpf.FloodBadType},
		floodCase{"two tags, IPv6", floodFrame(v6, c8021Q, c8021Q), bpf.FloodBadType},
		floodCase{"three tags", floodFrame(v4, c8021AD, c8021Q, c8021Q), floodNone},
		floodCase{"ARP", with(floodFrame(v4), 13, 6), floodNone},
		floodCase{"802.3 length", with(with(floodFrame(v4), 12, 0), 13, 60), floodNone},
		floodCase{"one word of options", floodFrame(options(v4, 1)), bpf.FloodBadType},
		floodCase{"ten words of options", floodFrame(options(v4, 10)), bpf.FloodBadType},
		floodCase{"header too short", floodFrame(with(v4, 0, 0x44)), floodNone},
		floodCase{"IPv4 that says 6", with(floodFrame(v4), 14, 0x65), floodNone},
		floodCase{"IPv6 that says 4", with(floodFrame(v6), 14, 0x45), floodNone},
		floodCase{"first fragment", floodFrame(with(v4, 6, 0x20)), floodNone},
		floodCase{"later fragment", floodFrame(with(v4, 7, 0x10)), floodNone},
		floodCase{"do not fragment", floodFrame(with(v4, 6, 0x40)), bpf.FloodBadType},
		floodCase{"TCP", floodFrame(with(v4, 9, protoTCP)), floodNone},
		floodCase{"TCP, IPv6", floodFrame(with(v6, 6, protoTCP)), floodNone},
		floodCase{"ICMP", floodFrame(with(v4, 9, protoICMP)), floodNone},
		floodCase{"port above", floodFrame(port(v4, 23)), floodNone},
		floodCase{"port far above", floodFrame(port(v4, 22)), floodNone},
		floodCase{"port above, IPv6", floodFrame(port(v6, 43)), floodNone},
		floodCase{"from the port to another", floodFrame(with(with(port(v4, 23), 20, floodPort>>8), 21, floodPort&0xff)), floodNone},
		floodCase{"hop-by-hop", dst6(v6, 0), bpf.FloodBadType},
		floodCase{"six extensions", dst6(v6, 0, 60, 43, 60, 60, 60), bpf.FloodBadType},
		floodCase{"seven extensions", dst6(v6, 0, 60, 43, 60, 60, 60, 60), floodNone},
		floodCase{"long extension", floodFrame(long), bpf.FloodBadType},
		floodCase{"routing, arrived", dst6(v6, 43), bpf.FloodBadType},
		floodCase{"routing, on its way", floodFrame(segmentsLeft), floodNone},
		floodCase{"fragment header", dst6(v6, 44), floodNone},
		floodCase{"fragment behind options", dst6(v6, 60, 44), floodNone},
		floodCase{"authentication header", dst6(v6, 51), floodNone},
		floodCase{"no next header", dst6(v6, 59), floodNone},
		floodCase{"mapped source", floodFrame(slices.Concat(v6[:8], make([]byte, 10), []byte{255, 255, 1, 2, 3, 4}, v6[24:])), floodNone},
		floodCase{"length of UDP below its header", floodFrame(with(v4, 25, 7)), floodNone},
		floodCase{"length of UDP 0", floodFrame(with(v4, 25, 0)), floodNone},
		floodCase{"forwarded", floodFrame(floodUDP(floodThere4, floodKnown4, bad)), floodNone},
		floodCase{"forwarded, IPv6", floodFrame(floodUDP(floodThere6, floodKnown6, bad)), floodNone},
		floodCase{"forwarded initiation", floodFrame(floodUDP(floodThere4, floodKnown4, wireguard(1, 148))), floodNone},
		floodCase{"broadcast", floodFrame(floodUDP(floodThere4, netip.MustParseAddr("255.255.255.255"), bad)), floodNone},
		floodCase{"known initiation", floodFrame(floodUDP(floodKnown4, floodHere4, wireguard(1, 148))), bpf.FloodPassed},
		floodCase{"known initiation, IPv6", floodFrame(floodUDP(floodKnown6, floodHere6, wireguard(1, 148))), bpf.FloodPassed},
		floodCase{"known, bad", floodFrame(floodUDP(floodKnown4, floodHere4, bad)), bpf.FloodBadType},
	)
}

// TestFloodPackets runs the table through both entrances, and through the twin.
func TestFloodPackets(t *testing.T) {
	needRoot(t)
	f := openFlood(t, FloodConfig{})
	twin := newFloodTwin()
	twin.burst, twin.global = 1000, 1000
	for _, c := range floodCases() {
		for _, program := range []string{floodXDP, floodEther} {
			if got := floodCause(t, f, program, ebpf.RunOptions{Data: c.frame}); got != c.want {
				t.Errorf("%s, %s: counted %d, want %d", c.name, program, got, c.want)
			}
		}
		if got := twin.judge(c.frame); got != c.want {
			t.Errorf("%s: the twin says %d, want %d", c.name, got, c.want)
		}
	}
}

// TestFloodCut: a frame that ends early passes until the message's first word is there; the kernel drops it later.
func TestFloodCut(t *testing.T) {
	needRoot(t)
	f := openFlood(t, FloodConfig{})
	bad := wireguard(9, 64)
	v4, v6 := floodUDP(floodThere4, floodHere4, bad), floodUDP(floodThere6, floodHere6, bad)
	for name, c := range map[string]struct {
		frame []byte
		seen  int // bytes that show the message's first word
	}{
		"IPv4":           {floodFrame(v4), 14 + 20 + 8 + 4},
		"IPv4, options":  {floodFrame(options(v4, 10)), 14 + 60 + 8 + 4},
		"IPv6":           {floodFrame(v6), 14 + 40 + 8 + 4},
		"IPv6, extended": {floodFrame(arrived(v6, 0, 60, 43)), 14 + 40 + 24 + 8 + 4},
		"tags":           {floodFrame(v4, unix.ETH_P_8021AD, unix.ETH_P_8021Q), 14 + 8 + 20 + 8 + 4},
	} {
		for n := 14; n <= len(c.frame); n++ {
			want := floodNone
			if n >= c.seen {
				want = bpf.FloodBadType
			}
			frame := c.frame[:n]
			if got := floodCause(t, f, floodXDP, ebpf.RunOptions{Data: frame}); got != want {
				t.Errorf("%s, %d of %d bytes, XDP: counted %d, want %d", name, n, len(c.frame), got, want)
			}
			if !testRunTakes(frame) {
				continue
			}
			if got := floodCause(t, f, floodEther, ebpf.RunOptions{Data: frame}); got != want {
				t.Errorf("%s, %d of %d bytes, tc: counted %d, want %d", name, n, len(c.frame), got, want)
			}
		}
	}
}

// floodTally runs a frame many times and counts what became of it.
func floodTally(t *testing.T, f *Flood, src netip.Addr, times int) (tally [bpf.FloodCauses]int) {
	t.Helper()
	dst := floodHere4
	if src.Is6() {
		dst = floodHere6
	}
	frame := floodFrame(floodUDP(src, dst, wireguard(1, 148)))
	for range times {
		tally[floodCause(t, f, floodXDP, ebpf.RunOptions{Data: frame})]++
	}
	return tally
}

// passTime lets time pass for every bucket: it becomes full so much earlier.
func passTime(t *testing.T, f *Flood, d time.Duration) {
	t.Helper()
	for _, name := range []string{mapFloodSources, mapFloodKnown} {
		var key [16]byte
		var value uint64
		buckets := map[[16]byte]uint64{}
		it := f.coll.Maps[name].Iterate()
		for it.Next(&key, &value) {
			buckets[key] = value
		}
		must(t, it.Err(), "list buckets")
		for k, v := range buckets {
			must(t, f.coll.Maps[name].Put(k, v-min(v, uint64(d))), "age a bucket")
		}
	}
	var value uint64
	must(t, f.coll.Maps[mapFloodGlobal].Lookup(uint32(0), &value), "read the common bucket")
	must(t, f.coll.Maps[mapFloodGlobal].Put(uint32(0), value-min(value, uint64(d))), "age the common bucket")
}

func wantTally(t *testing.T, what string, got [bpf.FloodCauses]int, passed, source, global int) {
	t.Helper()
	if want := [bpf.FloodCauses]int{bpf.FloodPassed: passed, bpf.FloodRateSource: source, bpf.FloodRateGlobal: global}; got != want {
		t.Errorf("%s: passed, bad length, bad type, rate of source, global rate are %v, want %v", what, got, want)
	}
}

// TestFloodRates: bursts of one source, of many, of known ones, and what comes back with time.
func TestFloodRates(t *testing.T) {
	needRoot(t)
	f := openFlood(t, FloodConfig{PerSource: FloodRate{time.Hour, 10}, Known: FloodRate{time.Hour, 30}, Global: FloodRate{time.Hour / 2, 25}})
	addr := netip.MustParseAddr
	wantTally(t, "a first burst", floodTally(t, f, floodThere4, 100), 10, 90, 0)
	wantTally(t, "a neighbour", floodTally(t, f, addr("203.0.113.10"), 10), 10, 0, 0)
	wantTally(t, "the fifth after 20", floodTally(t, f, addr("203.0.113.11"), 12), 5, 2, 5)
	wantTally(t, "known, whatever strangers do", floodTally(t, f, floodKnown4, 40), 30, 10, 0)
	wantTally(t, "known, IPv6", floodTally(t, f, floodKnown6, 31), 30, 1, 0)
	wantTally(t, "a neighbour of a known IPv6 address", floodTally(t, f, floodKnown6.Next(), 1), 0, 0, 1)

	passTime(t, f, 3*time.Hour+time.Minute) // 3 tokens for each source, 6 for all together
	wantTally(t, "after three tokens", floodTally(t, f, floodThere4, 5), 3, 2, 0)
	wantTally(t, "known, after three tokens", floodTally(t, f, floodKnown4, 5), 3, 2, 0)
	wantTally(t, "IPv6 by /64", floodTally(t, f, addr("2001:db8:7:7::1"), 2), 2, 0, 0)

	passTime(t, f, 1000*time.Hour)
	wantTally(t, "IPv6 by /64, full again", floodTally(t, f, addr("2001:db8:7:7:1::"), 6), 6, 0, 0)
	wantTally(t, "the same /64", floodTally(t, f, addr("2001:db8:7:7:ffff::1"), 6), 4, 2, 0)
	wantTally(t, "the next /64", floodTally(t, f, addr("2001:db8:7:8::1"), 12), 10, 2, 0)
	wantTally(t, "all that is left", floodTally(t, f, floodThere4, 10), 5, 0, 5)
}

// TestFloodSpoofed: addresses that change with each initiation get what all strangers have, and no more.
func TestFloodSpoofed(t *testing.T) {
	needRoot(t)
	f := openFlood(t, FloodConfig{PerSource: FloodRate{time.Hour, 10}, Global: FloodRate{time.Hour, 50}, MaxSources: 256})
	var tally [bpf.FloodCauses]int
	for i := range 2000 {
		one := floodTally(t, f, netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 1)
		for cause, n := range one {
			tally[cause] += n
		}
	}
	wantTally(t, "2000 forged sources", tally, 50, 0, 1950)
	wantTally(t, "a known one beside them", floodTally(t, f, floodKnown4, 5), 5, 0, 0)
}

// TestFloodRuns: datagrams that the kernel has glued into one are read each by itself.
func TestFloodRuns(t *testing.T) {
	needRoot(t)
	f := openFlood(t, FloodConfig{PerSource: FloodRate{time.Hour, 10}, Global: FloodRate{time.Hour, 1000}})
	to := func(dst, src netip.Addr, size int, messages ...[]byte) ebpf.RunOptions {
		ctx := make([]byte, 192) // struct __sk_buff
		binary.NativeEndian.PutUint32(ctx[164:], uint32(len(messages)))
		binary.NativeEndian.PutUint32(ctx[176:], uint32(size))
		return ebpf.RunOptions{Data: floodFrame(floodUDP(src, dst, slices.Concat(messages...))), Context: ctx}
	}
	run := func(src netip.Addr, size int, messages ...[]byte) ebpf.RunOptions {
		return to(floodHere4, src, size, messages...)
	}
	initiation, data := wireguard(1, 148), wireguard(4, 148)
	for _, c := range []struct {
		name   string
		o      ebpf.RunOptions
		cause  int
		amount uint64
	}{
		{"data", run(floodThere4, 148, data, data, data), bpf.FloodPassed, 3},
		{"data, the last shorter", run(floodThere4, 1452, wireguard(4, 1452), wireguard(4, 80)), bpf.FloodPassed, 2},
		{"six initiations", run(floodThere4, 148, slices.Repeat([][]byte{initiation}, 6)...), bpf.FloodPassed, 6},
		{"five where four are left", run(floodThere4, 148, slices.Repeat([][]byte{initiation}, 5)...), bpf.FloodRateSource, 5},
		{"four where four are left", run(floodThere4, 148, slices.Repeat([][]byte{initiation}, 4)...), bpf.FloodPassed, 4},
		{"one behind data", run(floodThere4, 1452, wireguard(4, 1452), initiation), bpf.FloodRateSource, 2},
		{"more than a burst from a fresh source", run(floodThere4.Next(), 148, slices.Repeat([][]byte{initiation}, 11)...), bpf.FloodRateSource, 11},
		{"bad type", run(floodThere4, 64, wireguard(9, 64), wireguard(9, 64)), bpf.FloodBadType, 2},
		{"bad length", run(floodThere4, 91, wireguard(2, 91), wireguard(2, 91)), bpf.FloodBadLength, 2},
		{"data beside bad", run(floodThere4, 64, wireguard(9, 64), wireguard(4, 64)), bpf.FloodPassed, 1},
		{"forwarded, bad", to(floodKnown4, floodThere4, 64, wireguard(9, 64), wireguard(9, 64)), floodNone, 0},
		{"forwarded initiations", to(floodKnown4, floodThere4, 148, slices.Repeat([][]byte{initiation}, 11)...), floodNone, 0},
		{"64 datagrams", run(floodThere4, 32, slices.Repeat([][]byte{wireguard(4, 32)}, 64)...), bpf.FloodPassed, 64},
	} {
		before := floodCounts(t, f)
		if got := floodCause(t, f, floodEther, c.o); got != c.cause {
			t.Errorf("%s: counted %d, want %d", c.name, got, c.cause)
		} else if got == floodNone {
			continue
		} else if n := floodCounts(t, f)[got] - before[got]; n != c.amount {
			t.Errorf("%s: counted %d times, want %d", c.name, n, c.amount)
		}
	}
}

func floodCounts(t *testing.T, f *Flood) [bpf.FloodCauses]uint64 {
	t.Helper()
	c, err := f.Counters()
	must(t, err, "counters")
	return [bpf.FloodCauses]uint64{c.Passed, c.BadLength, c.BadType, c.RateSource, c.RateGlobal}
}

// TestFloodKnown: addresses come and go, and one that stays keeps its bucket.
func TestFloodKnown(t *testing.T) {
	needRoot(t)
	f := openFlood(t, FloodConfig{PerSource: FloodRate{time.Hour, 1}, Known: FloodRate{time.Hour, 3}, Global: FloodRate{time.Hour, 1}, MaxKnown: 2})
	wantTally(t, "known", floodTally(t, f, floodKnown4, 2), 2, 0, 0)
	must(t, f.SetKnown([]netip.Addr{netip.AddrFrom16(floodKnown4.As16()), floodThere4, floodThere4}), "set known addresses, one mapped and one twice")
	wantTally(t, "one that stayed", floodTally(t, f, floodKnown4, 2), 1, 1, 0)
	wantTally(t, "one that came", floodTally(t, f, floodThere4, 4), 3, 1, 0)
	wantTally(t, "one that went", floodTally(t, f, floodKnown6, 2), 1, 1, 0)
	for name, addrs := range map[string][]netip.Addr{"too many": {floodKnown4, floodThere4, floodKnown6}, "no address": {{}}} {
		if err := f.SetKnown(addrs); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantTally(t, "as before", floodTally(t, f, floodThere4, 1), 0, 1, 0)
	must(t, f.SetOwn(nil), "set own addresses")
	if got := floodCause(t, f, floodXDP, ebpf.RunOptions{Data: floodFrame(floodUDP(floodThere4, floodHere4, wireguard(9, 64)))}); got != floodNone {
		t.Errorf("a host without addresses counted %d", got)
	}
}

// TestFloodConfig: what cannot be meant is refused before anything is loaded.
func TestFloodConfig(t *testing.T) {
	for name, cfg := range map[string]FloodConfig{
		"no port":     {},
		"mode":        {Port: 1, Mode: 9},
		"burst 0":     {Port: 1, PerSource: FloodRate{time.Second, 0}},
		"endless":     {Port: 1, Global: FloodRate{0, 5}},
		"slow":        {Port: 1, Known: FloodRate{2 * time.Hour, 5}},
		"great burst": {Port: 1, Known: FloodRate{time.Second, maxFloodBurst + 1}},
		"sources":     {Port: 1, MaxSources: -1},
		"known":       {Port: 1, MaxKnown: 1<<24 + 1},
	} {
		if _, err := OpenFlood(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for m := FloodAuto; m <= FloodTC; m++ {
		if got, err := ParseFloodMode(m.String()); err != nil || got != m {
			t.Errorf("%v is read as %v: %v", m, got, err)
		}
	}
	if _, err := ParseFloodMode("off"); !errors.Is(err, ErrConfig) {
		t.Errorf("off is no mode of a guard: %v", err)
	}
}
