package link

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writeSysctl is for tests that prepare a host.
func writeSysctl(device, name, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", device, name), []byte(value), 0)
}

func TestOverlaps(t *testing.T) {
	h := newHost(t)
	h.must(applyUp(h, spec))
	find := func() (out []string) {
		h.must(func() error {
			all, err := Overlaps(spec.Overlay, tunnel)
			for _, c := range all {
				out = append(out, strings.TrimSuffix(c.String(), ": choose another range with the coordinator's overlay setting"))
			}
			return err
		})
		return out
	}
	if got := find(); len(got) != 0 {
		t.Fatalf("a host without overlap has %q", got)
	}
	h.ip("route add unreachable 198.0.0.0/8")         // less specific and denying: harmless
	h.ip("route add 0.0.0.0/1 via 10.1.0.254")        // half of a default route
	h.ip("route add 198.51.100.0/24 via 10.1.0.254")  // elsewhere
	h.ip("-6 route add fd5f::/48 via 2001:db8::fe")   // elsewhere
	h.ip("rule add from 10.9.9.9 table 77")           // tables of others count too
	h.ip("route add table 77 default via 10.1.0.254") // a default route
	if got := find(); len(got) != 0 {
		t.Errorf("harmless routes are %q", got)
	}
	for _, c := range []struct{ add, want string }{
		{"addr add 198.19.0.5/24 dev under0", "overlay range 198.18.0.0/15 overlaps address 198.19.0.5/24 on under0"},
		{"route add 198.0.0.0/8 via 10.1.0.254 metric 7", "overlay range 198.18.0.0/15 overlaps route 198.0.0.0/8 on under0 in routing table 254"},
		{"route add table 77 198.18.9.0/24 via 10.1.0.254", "overlay range 198.18.0.0/15 overlaps route 198.18.9.0/24 on under0 in routing table 77"},
		{"route add blackhole 198.18.8.0/24", "overlay range 198.18.0.0/15 overlaps route 198.18.8.0/24 in routing table 254"},
		{"-6 route add fd00::/8 via 2001:db8::fe", "overlay range fd5e::/48 overlaps route fd00::/8 on under0 in routing table 254"},
	} {
		h.ip(c.add)
		if got := find(); !slices.Contains(got, c.want) {
			t.Errorf("after %s: %q", c.add, got)
		}
	}
}

func TestCandidates(t *testing.T) {
	h := newHost(t)
	h.must(applyUp(h, spec))
	h.link("aside0")
	for _, c := range []string{
		"addr add 172.17.0.1/16 dev aside0", "addr add fd77::1/64 dev aside0 nodad", "addr add 169.254.3.3/16 dev under0", "addr add fe80::3/64 dev under0 nodad",
		"addr add 198.19.0.9/32 dev aside0", "addr add 2001:db8::bad/64 dev under0 nodad preferred_lft 0", "addr add 10.3.3.3/32 dev lo",
		"link add down0 type veth peer name down1", "addr add 10.4.4.4/32 dev down0",
	} {
		h.ip(c)
	}
	var got []netip.AddrPort
	h.must(func() (err error) {
		got, err = Candidates(51820, Exclude{Interfaces: []string{tunnel}, Prefixes: spec.Overlay})
		return err
	})
	want := "[10.1.0.1:51820 [2001:db8::1]:51820 172.17.0.1:51820 [fd77::1]:51820]"
	if fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
	for i := range 2 * maxCandidates {
		h.ip(fmt.Sprintf("addr add 10.5.5.%d/32 dev aside0", i))
	}
	h.must(func() (err error) {
		got, err = Candidates(51820, Exclude{Interfaces: []string{tunnel}})
		return err
	})
	if len(got) != maxCandidates || got[0].String() != "10.1.0.1:51820" {
		t.Errorf("%d candidates: %v", len(got), got)
	}
	if _, err := Candidates(0, Exclude{}); !errors.Is(err, ErrSpec) {
		t.Errorf("port 0: %v", err)
	}
}

func TestLinks(t *testing.T) {
	h := newHost(t)
	var got []Info
	h.must(func() (err error) {
		got, err = Links()
		return err
	})
	for i := range got {
		got[i].Index = 0
	}
	want := []Info{
		{Name: "lo", Kind: "device", Loopback: true, Up: true, MTU: 65536},
		{Name: tunnel, Kind: "tun", MTU: 1500},
		{Name: "under0-far", Kind: "veth", Up: true, MTU: 1500},
		{Name: "under0", Kind: "veth", Up: true, MTU: 1500},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestWatch(t *testing.T) {
	h := newHost(t)
	events := h.watch()
	h.must(applyUp(h, spec))
	node := netip.PrefixFrom(spec.Node[1], 128)
	a := await(t, events, "address added", func(e Event) bool { return e.Kind == AddressChanged && e.Prefix == node && !e.Gone })
	if a.Index == 0 {
		t.Errorf("%+v", a)
	}
	await(t, events, "link up", func(e Event) bool { return e.Kind == LinkChanged && e.Index == a.Index })
	await(t, events, "route added", func(e Event) bool {
		return e.Kind == RouteChanged && e.Prefix == spec.Overlay[0] && e.Index == a.Index && e.Ours && !e.Gone
	})
	h.ip("route del 198.18.0.0/15 dev " + tunnel)
	await(t, events, "route removed", func(e Event) bool { return e.Kind == RouteChanged && e.Prefix == spec.Overlay[0] && e.Gone })
	h.ip("addr del 198.18.0.10/32 dev " + tunnel)
	await(t, events, "address removed", func(e Event) bool { return e.Kind == AddressChanged && e.Gone && e.Prefix.Addr() == spec.Addresses[0] })
	h.ip("link del " + tunnel)
	await(t, events, "link removed", func(e Event) bool { return e.Kind == LinkChanged && e.Index == a.Index && e.Gone })
}

func TestWatchEnds(t *testing.T) {
	h := newSpace(t)
	ctx, cancel := context.WithCancel(t.Context())
	var w *Watcher
	h.must(func() (err error) {
		w, err = Watch(ctx, func(Event) {})
		return err
	})
	cancel()
	select {
	case <-w.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the end of the context does not end the watch")
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestWatchOverflow makes more changes than the queue holds while the reader is stuck: the reader learns of the loss.
func TestWatchOverflow(t *testing.T) {
	h := newHost(t)
	release, stuck, lost := make(chan struct{}), make(chan struct{}, 1), make(chan struct{}, 1)
	var w *Watcher
	h.must(func() (err error) {
		w, err = Watch(t.Context(), func(e Event) {
			select {
			case stuck <- struct{}{}:
			default:
			}
			<-release
			if e.Kind == Lost {
				select {
				case lost <- struct{}{}:
				default:
				}
			}
		})
		if err == nil {
			err = w.socket.SetReceiveBufferSize(4096, false)
		}
		return err
	})
	defer w.Close()
	for i := range 60 {
		h.ip(fmt.Sprintf("addr add 10.6.6.%d/32 dev under0", i))
	}
	<-stuck
	close(release)
	select {
	case <-lost:
	case <-time.After(5 * time.Second):
		t.Fatal("the loss was not reported")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(uint16(unix.RTM_NEWLINK), make([]byte, unix.SizeofIfInfomsg))
	f.Add(uint16(unix.RTM_NEWADDR), append(make([]byte, unix.SizeofIfAddrmsg), 8, 0, 1, 0, 198, 18, 0, 1))
	f.Add(uint16(unix.RTM_DELROUTE), append(make([]byte, unix.SizeofRtMsg), 8, 0, 4, 0, 1, 0, 0, 0))
	f.Fuzz(func(t *testing.T, kind uint16, data []byte) {
		m := syscall.NetlinkMessage{Data: data}
		m.Header.Type = kind
		if e, ok := decode(m); ok && (e.Kind < LinkChanged || e.Kind > RouteChanged) {
			t.Errorf("%+v", e)
		}
	})
}
