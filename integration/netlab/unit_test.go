package netlab

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParseMount(t *testing.T) {
	for _, c := range []struct {
		line string
		want mount
		ok   bool
	}{
		{`41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw`, mount{"/sys/fs/cgroup/unified", "cgroup2", "cgroup2"}, true},
		{`50 1 0:40 / /tmp/a\040b rw shared:2 master:1 - bpf netlab-x rw,mode=700`, mount{"/tmp/a b", "bpf", "netlab-x"}, true},
		{`50 1 0:40 / /tmp rw`, mount{}, false},
		{``, mount{}, false},
		{` - `, mount{}, false},
	} {
		if got, ok := parseMount(c.line); got != c.want || ok != c.ok {
			t.Errorf("parseMount(%q) = %v, %v", c.line, got, ok)
		}
	}
	for in, want := range map[string]string{`a\134b`: `a\b`, `a\`: `a\`, `a\9`: `a\9`, `a\999`: `a\999`, `\040\011`: " \t"} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestNamespaceInode(t *testing.T) {
	for in, want := range map[string]uint64{"net:[4026531840]": 4026531840, "net:[]": 0, "mnt:[1]": 0, "": 0, "net:[x]": 0} {
		if got := namespaceInode(in); got != want {
			t.Errorf("namespaceInode(%q) = %d, want %d", in, got, want)
		}
	}
}

func TestShellQuote(t *testing.T) {
	for in, want := range map[string]string{"a": "a", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$x": "'$x'"} {
		if got := shellQuote(in); got != want {
			t.Errorf("shellQuote(%q) = %s, want %s", in, got, want)
		}
	}
}

func TestRuleset(t *testing.T) {
	got := ruleset(map[cut]struct{}{
		{from: "port0", to: "port1"}:                            {},
		{from: "port0", addr: netip.MustParseAddr("192.0.2.1")}: {},
		{to: "port0", addr: netip.MustParseAddr("2001:db8::1")}: {},
	})
	for _, want := range []string{
		`iifname "port0" oifname "port1" drop`, `iifname "port0" ip daddr 192.0.2.1 drop`, `oifname "port0" ip6 saddr 2001:db8::1 drop`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

func TestOutputIsBounded(t *testing.T) {
	o := newOutput(nil)
	line := []byte(strings.Repeat("x", 1<<16-1) + "\n")
	for range 100 {
		if n, err := o.Write(line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	if _, err := o.Write([]byte("the end")); err != nil {
		t.Fatal(err)
	}
	text := o.text()
	if len(text) > 2*maxOutput+64 || len(text) < maxOutput {
		t.Errorf("kept %d bytes", len(text))
	}
	if !strings.HasSuffix(text, "the end") || !strings.Contains(text[:64], "bytes before this are gone") {
		t.Errorf("kept the wrong part: %q ... %q", text[:64], text[len(text)-16:])
	}
}

func TestClassify(t *testing.T) {
	ether := func(kind string, rest ...string) []byte {
		return []byte(strings.Repeat("m", 12) + kind + strings.Join(rest, ""))
	}
	v4 := func(frag, proto string) string {
		return "\x45\x00\x00\x00\x00\x00" + frag + "\x40" + proto + "\x00\x00\xc0\x00\x02\x01\xc0\x00\x02\x02"
	}
	v6 := func(next string) string {
		a := "\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11)
		return "\x60\x00\x00\x00\x00\x00" + next + "\x40" + a + "\x01" + a + "\x02"
	}
	const ports = "\xca\x6c\x00\x35"
	for _, c := range []struct {
		name  string
		frame []byte
		want  string
	}{
		{"empty", nil, "ethertype 0x0000"},
		{"arp", ether("\x08\x06", "anything"), "arp"},
		{"lldp", ether("\x88\xcc"), "ethertype 0x88cc"},
		{"udp", ether("\x08\x00", v4("\x40\x00", "\x11"), ports), "udp 192.0.2.1:51820 > 192.0.2.2:53"},
		{"tcp6", ether("\x86\xdd", v6("\x06"), ports), "tcp [2001:db8::1]:51820 > [2001:db8::2]:53"},
		{"first fragment", ether("\x08\x00", v4("\x20\x00", "\x11"), ports), "udp fragment 192.0.2.1:51820 > 192.0.2.2:53"},
		{"later fragment", ether("\x08\x00", v4("\x20\x01", "\x11"), ports), "udp fragment 192.0.2.1 > 192.0.2.2"},
		{"icmp", ether("\x08\x00", v4("\x00\x00", "\x01"), ports), "icmp type 202 192.0.2.1 > 192.0.2.2"},
		{"v6 unreachable", ether("\x86\xdd", v6("\x3a"), "\x01\x00"), "icmp6 type 1 2001:db8::1 > 2001:db8::2"},
		{"hop-by-hop", ether("\x86\xdd", v6("\x00"), "\x11\x00......", ports), "udp [2001:db8::1]:51820 > [2001:db8::2]:53"},
		{"v6 fragment", ether("\x86\xdd", v6("\x2c"), "\x11\x00\x00\x09....", ports), "udp fragment 2001:db8::1 > 2001:db8::2"},
		{"v6 first fragment", ether("\x86\xdd", v6("\x2c"), "\x11\x00\x00\x01....", ports), "udp fragment [2001:db8::1]:51820 > [2001:db8::2]:53"},
		{"short extension", ether("\x86\xdd", v6("\x00"), "\x11\x05.."), "proto 0 2001:db8::1 > 2001:db8::2"},
		{"endless extensions", ether("\x86\xdd", v6("\x00"), strings.Repeat("\x00\x00......", 20)), "proto 0 2001:db8::1 > 2001:db8::2"},
	} {
		got := classify(c.frame)
		if got.String() != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		// The same packet on a tunnel device, where it has no link header.
		if whole := got.EtherType == etherIPv4 || got.EtherType == etherIPv6; whole && len(c.frame) > etherHeader && got.Src.IsValid() && classifyIP(c.frame[etherHeader:]) != got {
			t.Errorf("%s without link header: %v, want %v", c.name, classifyIP(c.frame[etherHeader:]), got)
		}
	}
}

func TestHousekeeping(t *testing.T) {
	for _, c := range []struct {
		flow Flow
		want bool
	}{
		{Flow{EtherType: etherARP}, true},
		{Flow{EtherType: etherIPv6, Proto: 58, ICMPType: 135}, true},
		{Flow{EtherType: etherIPv6, Proto: 58, ICMPType: 143}, true},
		{Flow{EtherType: etherIPv6, Proto: 58, ICMPType: 135, Fragment: true}, false},
		{Flow{EtherType: etherIPv6, Proto: 58, ICMPType: 128}, false},
		{Flow{EtherType: etherIPv4, Proto: 1, ICMPType: 135}, false},
		{Flow{}, false},
	} {
		if got := c.flow.Housekeeping(); got != c.want {
			t.Errorf("%v: %v, want %v", c.flow, got, c.want)
		}
	}
}

func FuzzClassify(f *testing.F) {
	f.Add([]byte("mmmmmmmmmmmm\x86\xdd"))
	f.Add([]byte("mmmmmmmmmmmm\x08\x00\x4f"))
	f.Fuzz(func(_ *testing.T, frame []byte) { _ = classify(frame).String() })
}

func TestRecordingWithHolesProvesNothing(t *testing.T) {
	r := &Recording{Packets: []Packet{{Data: []byte("a text")}}, Seen: map[string]Packet{"watched": {}}}
	for _, hole := range []func(){func() { r.Lost = 1 }, func() { r.Lost, r.Unkept = 0, 1 }} {
		hole()
		for _, there := range []string{"text", "watched"} {
			if _, found, err := r.Contains([]byte(there)); !found || err != nil {
				t.Errorf("%q: %v, %v", there, found, err)
			}
		}
		if _, _, err := r.Contains([]byte("absent")); !errors.Is(err, ErrIncomplete) {
			t.Errorf("absent: %v", err)
		}
	}
}

func TestCaptureKeepsWithinItsBound(t *testing.T) {
	c := &Capture{rec: &Recording{Flows: map[Flow]int{}, Seen: map[string]Packet{}}, watched: [][]byte{[]byte("needle")}, kept: maxKept}
	c.keep(Packet{Data: []byte("hay needle hay")})
	if c.rec.Unkept != 1 || len(c.rec.Packets) != 0 {
		t.Errorf("unkept %d, kept %d", c.rec.Unkept, len(c.rec.Packets))
	}
	if _, found, err := c.rec.Contains([]byte("needle")); !found || err != nil {
		t.Errorf("watched text in a frame that was not kept: %v, %v", found, err)
	}
}
