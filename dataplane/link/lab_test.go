package link

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// space is a network namespace of the test, kept alive by a descriptor only.
type space struct {
	t  testing.TB
	fd int
}

// newSpace makes a namespace on a thread that ends afterwards. Without root the test is skipped; with root it must run.
func newSpace(t testing.TB) *space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and devices")
	}
	s := &space{t: t, fd: -1}
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		errs <- err
	}()
	if err := <-errs; err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(s.fd) })
	s.ip("link set lo up")
	return s
}

// do runs f on a thread inside the namespace, which ends afterwards.
func (s *space) do(f func()) {
	s.t.Helper()
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(s.fd, unix.CLONE_NEWNET); err != nil {
			errs <- err
			return
		}
		f()
		errs <- nil
	}()
	if err := <-errs; err != nil {
		s.t.Fatalf("enter network namespace: %v", err)
	}
}

// must runs f inside and fails the test on its error.
func (s *space) must(f func() error) {
	s.t.Helper()
	var err error
	s.do(func() { err = f() })
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *space) ip(command string) string {
	s.t.Helper()
	var out []byte
	var err error
	s.do(func() { out, err = exec.Command("ip", strings.Fields(command)...).CombinedOutput() })
	if err != nil {
		s.t.Fatalf("ip %s: %v: %s", command, err, out)
	}
	return string(out)
}

// eventLog keeps the events of a namespace. The kernel announces some of them late, so their order means nothing.
type eventLog struct {
	arrive chan Event
	seen   []Event
}

// watch gathers the events of the namespace.
func (s *space) watch() *eventLog {
	s.t.Helper()
	events := make(chan Event, 1000)
	var w *Watcher
	s.must(func() (err error) {
		w, err = Watch(s.t.Context(), func(e Event) { events <- e })
		return err
	})
	s.t.Cleanup(func() {
		if err := w.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return &eventLog{arrive: events}
}

// await returns the first event that matches, among those seen before or to come.
func await(t *testing.T, events *eventLog, what string, match func(Event) bool) Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for i := 0; ; i++ {
		if i < len(events.seen) {
			if match(events.seen[i]) {
				return events.seen[i]
			}
			continue
		}
		select {
		case e := <-events.arrive:
			events.seen = append(events.seen, e)
			i-- // look at it
		case <-ctx.Done():
			t.Fatalf("no event: %s, among %+v", what, events.seen)
		}
	}
}

const tunnel = "signet0"

var spec = Spec{
	Interface: tunnel,
	MTU:       1400,
	Node:      []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd5e::1")},
	Addresses: []netip.Addr{
		netip.MustParseAddr("198.18.0.10"), netip.MustParseAddr("fd5e::10"), netip.MustParseAddr("fd5e::ffff:ffff"), netip.MustParseAddr("198.18.0.1"),
	},
	Overlay: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd5e::/48")},
}

// newHost makes a namespace with a tunnel device and an underlay with default routes of both families.
func newHost(t testing.TB) *space {
	t.Helper()
	s := newSpace(t)
	s.ip("tuntap add dev " + tunnel + " mode tun")
	s.underlay()
	return s
}

func (s *space) underlay() {
	s.t.Helper()
	s.link("under0")
	s.ip("addr add 10.1.0.1/24 dev under0")
	s.ip("addr add 2001:db8::1/64 dev under0 nodad")
	s.ip("route add default via 10.1.0.254")
	s.ip("-6 route add default via 2001:db8::fe")
}

// link makes an interface that is up; its other end, in the same namespace, has no address.
func (s *space) link(name string) {
	s.t.Helper()
	s.ip("link add " + name + " type veth peer name " + name + "-far")
	for _, end := range []string{name, name + "-far"} {
		s.ip("link set " + end + " addrgenmode none")
		s.ip("link set " + end + " up")
	}
}

// newSpec is a copy that a test may change.
func newSpec() Spec {
	s := spec
	s.Node, s.Addresses, s.Overlay = append([]netip.Addr{}, s.Node...), append([]netip.Addr{}, s.Addresses...), append([]netip.Prefix{}, s.Overlay...)
	return s
}
