package tunnel

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/key"
)

// needRoot skips without root. With root a test must run: what it lacks then is an error.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and TUN devices")
	}
}

// space is a network namespace of the test, kept alive by a descriptor only.
type space struct {
	t  testing.TB
	fd int
}

// newSpace makes a namespace on a thread that ends afterwards, so that no other goroutine ever runs in it.
func newSpace(t testing.TB) *space {
	t.Helper()
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

// do runs f on a thread inside the namespace.
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

// run executes a program inside the namespace.
func (s *space) run(name string, args ...string) (string, error) {
	var out []byte
	var err error
	s.do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	return string(out), err
}

func (s *space) ip(command string) string {
	s.t.Helper()
	out, err := s.run("ip", strings.Fields(command)...)
	if err != nil {
		s.t.Fatalf("ip %s: %v: %s", command, err, out)
	}
	return out
}

// path is how other processes name the namespace.
func (s *space) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.fd) }

// host is one end of a lab: a namespace with a tunnel device.
type host struct {
	*space
	number  int
	kind    string
	private key.Private
	tunnel  engine
}

const (
	device0  = "signet0"
	testPort = 51820
)

func (h *host) v4() netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 0, byte(h.number)}) }
func (h *host) v6() netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd5e::%d", h.number)) }
func (h *host) underlay() netip.Addr {
	return netip.AddrFrom4([4]byte{10, 99, 0, byte(h.number)})
}
func (h *host) underlay6() netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd99::%d", h.number)) }

// peer describes h to the others.
func (h *host) peer() Peer {
	return Peer{
		Key:        h.private.Public(),
		AllowedIPs: []netip.Prefix{netip.PrefixFrom(h.v4(), 32), netip.PrefixFrom(h.v6(), 128)},
		Endpoints:  []netip.AddrPort{netip.AddrPortFrom(h.underlay(), testPort)},
	}
}

// open starts the engine and sets addresses and routes the way package link does.
func (h *host) open() engine {
	h.t.Helper()
	var err error
	h.do(func() {
		cfg := Config{Name: device0, ListenPort: testPort, PrivateKey: h.private, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}
		h.tunnel, err = openKind(h.t.Context(), h.kind, cfg)
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.tunnel.SetOwnAddresses([]netip.Addr{h.v4(), h.v6()})
	return h.tunnel
}

func (h *host) address() {
	h.t.Helper()
	h.ip(fmt.Sprintf("addr add %s/32 dev %s", h.v4(), device0))
	h.ip(fmt.Sprintf("addr add %s/128 dev %s nodad", h.v6(), device0))
	h.ip("link set " + device0 + " addrgenmode none") // no link-local address, as package link has it
	h.ip("link set " + device0 + " up")
	h.ip("route add 198.18.0.0/15 dev " + device0)
	h.ip("route add fd5e::/16 dev " + device0)
}

func (h *host) up() {
	h.t.Helper()
	var err error
	h.do(func() { err = h.tunnel.Up(h.t.Context()) })
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) update(p Peer) {
	h.t.Helper()
	if err := h.tunnel.Update(h.t.Context(), p); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) status(k key.Public) PeerStatus {
	h.t.Helper()
	all, err := h.tunnel.Status()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, s := range all {
		if s.Key == k {
			return s
		}
	}
	h.t.Fatalf("no peer %s in status", k.Short())
	return PeerStatus{}
}

func newPrivate(t testing.TB) key.Private {
	t.Helper()
	k, err := key.NewPrivate()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// newHosts makes two hosts that a veth joins. Their tunnels are not open yet.
func newHosts(t testing.TB, of kinds) (a, b *host) {
	t.Helper()
	needRoot(t)
	a = &host{space: newSpace(t), number: 1, kind: of[0], private: newPrivate(t)}
	b = &host{space: newSpace(t), number: 2, kind: of[1], private: newPrivate(t)}
	a.ip("link add under0 type veth peer name under0 netns " + b.path())
	for _, h := range []*host{a, b} {
		h.ip(fmt.Sprintf("addr add %s/24 dev under0", h.underlay()))
		h.ip(fmt.Sprintf("addr add %s/64 dev under0 nodad", h.underlay6()))
		h.ip("link set under0 up")
	}
	return a, b
}

// newPair makes two hosts with running tunnels that know each other.
func newPair(t testing.TB, of kinds) (a, b *host) {
	t.Helper()
	a, b = newHosts(t, of)
	for _, h := range []*host{a, b} {
		tun := h.open()
		t.Cleanup(func() { _ = tun.Close() })
		h.address()
		h.up()
	}
	a.update(b.peer())
	b.update(a.peer())
	return a, b
}

// eventually polls a real condition until it holds.
func eventually(t testing.TB, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not within %v: %s", within, what)
		case <-tick.C:
		}
	}
	return time.Since(start)
}

// echo starts a TCP server in h that sends back what it gets.
func (h *host) echo(addr netip.Addr) netip.AddrPort {
	h.t.Helper()
	var l net.Listener
	var err error
	h.do(func() { l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String()) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// dial opens a TCP connection from inside h.
func (h *host) dial(to netip.AddrPort, within time.Duration) (c net.Conn, err error) {
	h.do(func() { c, err = (&net.Dialer{Timeout: within}).Dial("tcp", to.String()) })
	return c, err
}

// exchange sends n bytes through a connection of echo and reads them back.
func exchange(c net.Conn, n int) error {
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	go func() { _, _ = c.Write(make([]byte, n)) }()
	got, err := io.Copy(io.Discard, io.LimitReader(c, int64(n)))
	if err == nil && got != int64(n) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
