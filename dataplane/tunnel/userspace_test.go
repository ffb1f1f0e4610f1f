package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/key"
)

func TestTwoHostsExchange(t *testing.T) {
	testTwoHostsExchange(t, bothEmbedded)
}

func testTwoHostsExchange(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	took := eventually(t, 2*time.Second, "a handshake after creation, without traffic", func() bool {
		return a.status(b.private.Public()).Up && b.status(a.private.Public()).Up
	})
	t.Logf("handshake without traffic after %v", took)
	for _, addr := range []netip.Addr{b.v4(), b.v6()} {
		if out, err := a.run("ping", "-c", "1", "-W", "2", addr.String()); err != nil {
			t.Errorf("ping %s: %v: %s", addr, err, out)
		}
		c, err := a.dial(b.echo(addr), 2*time.Second)
		if err != nil {
			t.Fatalf("dial %s: %v", addr, err)
		}
		if err := exchange(c, 1<<20); err != nil {
			t.Errorf("exchange with %s: %v", addr, err)
		}
		_ = c.Close()
	}
	s := a.status(b.private.Public())
	if s.RxBytes < 2<<20 || s.TxBytes < 2<<20 || s.AllowedIPs != 2 || s.RefusedSource != 0 {
		t.Errorf("status %+v", s)
	}
	if want := b.peer().Endpoints[0]; s.Endpoint != want {
		t.Errorf("endpoint %v, want %v", s.Endpoint, want)
	}
	if n := a.tunnel.RefusedOwn(); n != 0 {
		t.Errorf("%d of the host's own packets were refused", n)
	}
}

func TestOpenLeavesLinkDown(t *testing.T) {
	testOpenLeavesLinkDown(t, bothEmbedded)
}

func testOpenLeavesLinkDown(t *testing.T, of kinds) {
	a, _ := newHosts(t, of)
	tun := a.open()
	defer tun.Close()
	a.up()
	if out := a.ip("-o link show " + device0); strings.Contains(out, "UP") {
		t.Errorf("the link is up: %s", out)
	}
	if got := tun.ListenPort(); got != testPort {
		t.Errorf("listen port %d", got)
	}
}

func TestDeviceOutlivesEngine(t *testing.T) {
	a, b := newPair(t, bothEmbedded)
	to := b.echo(b.v4())
	c, err := a.dial(to, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := exchange(c, 1000); err != nil {
		t.Fatal(err)
	}
	index := linkIndex(t, b)
	if err := b.tunnel.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.tunnel.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if err := b.tunnel.Update(t.Context(), a.peer()); !errors.Is(err, ErrClosed) {
		t.Errorf("update after close: %v", err)
	}
	if now := linkIndex(t, b); now != index {
		t.Fatalf("device changed: index %s, then %s", index, now)
	}
	took := reopen(t, a, b)
	t.Logf("traffic %v after re-open", took)
	if now := linkIndex(t, b); now != index {
		t.Errorf("device changed: index %s, then %s", index, now)
	}
	if err := exchange(c, 1000); err != nil {
		t.Errorf("connection from before: %v", err)
	}
}

// reopen starts b's engine again and returns how long it took until traffic passed. Addresses and routes are still
// there, because the device is.
func reopen(t *testing.T, a, b *host) time.Duration {
	t.Helper()
	start := time.Now()
	tun := b.open()
	t.Cleanup(func() { _ = tun.Close() })
	b.up()
	b.update(a.peer())
	eventually(t, time.Second, "a handshake after re-open", func() bool { return b.status(a.private.Public()).Up })
	c, err := a.dial(b.echo(b.v6()), time.Second)
	if err != nil {
		t.Fatalf("dial after re-open: %v", err)
	}
	defer c.Close()
	if err := exchange(c, 1000); err != nil {
		t.Fatalf("exchange after re-open: %v", err)
	}
	took := time.Since(start)
	if took > time.Second {
		t.Errorf("traffic only %v after re-open", took)
	}
	return took
}

func linkIndex(t *testing.T, h *host) string {
	t.Helper()
	index, _, ok := strings.Cut(h.ip("-o link show "+device0), ":")
	if !ok {
		t.Fatal("no link index")
	}
	return index
}

// childEnv makes this test binary play an agent that will be killed: the private key in hex.
const childEnv = "SIGNET_TUNNEL_CHILD"

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		if err := child(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// child opens the tunnel in the namespace it was started in, says so, and waits for its end.
func child(text string) error {
	var raw []byte
	if _, err := fmt.Sscanf(text, "%x", &raw); err != nil {
		return err
	}
	private, err := key.PrivateFromBytes(raw)
	if err != nil {
		return err
	}
	u, err := OpenUserspace(context.Background(), Config{Name: device0, ListenPort: testPort, PrivateKey: private})
	if err != nil {
		return err
	}
	if err := u.Up(context.Background()); err != nil {
		return err
	}
	fmt.Println("ready")
	<-u.Done()
	return errors.New("the engine ended")
}

func TestKilledEngine(t *testing.T) {
	a, b := newHosts(t, bothEmbedded)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+fmt.Sprintf("%x", b.private.Reveal()))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	b.do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(out, new(string)); err != nil {
		t.Fatalf("child: %v", err)
	}
	b.address()
	index := linkIndex(t, b)

	// While another process holds the device, it can be neither opened nor removed.
	b.do(func() {
		if _, err := OpenUserspace(t.Context(), Config{Name: device0, PrivateKey: b.private}); !errors.Is(err, ErrBusy) {
			t.Errorf("second open: %v", err)
		}
		if err := RemoveDevice(device0); !errors.Is(err, ErrBusy) {
			t.Errorf("remove of a device in use: %v", err)
		}
	})
	_ = cmd.Process.Signal(unix.SIGKILL)
	_ = cmd.Wait()
	if now := linkIndex(t, b); now != index {
		t.Fatalf("device changed: index %s, then %s", index, now)
	}
	if routes := b.ip("route show dev " + device0); !strings.Contains(routes, "198.18.0.0/15") {
		t.Errorf("the route is gone: %q", routes)
	}

	tun := a.open()
	t.Cleanup(func() { _ = tun.Close() })
	a.address()
	a.up()
	a.update(b.peer())
	t.Logf("traffic %v after re-open", reopen(t, a, b))
}

func TestRemoveDevice(t *testing.T) {
	a, _ := newHosts(t, bothEmbedded)
	a.open().Close()
	a.do(func() {
		for range 2 { // the second time it is not there, which is success
			if err := RemoveDevice(device0); err != nil {
				t.Error(err)
			}
		}
		if ok, err := exists(device0); ok || err != nil {
			t.Errorf("device exists: %v, %v", ok, err)
		}
		if _, err := OpenUserspace(t.Context(), Config{Name: "under0", PrivateKey: a.private}); err == nil {
			t.Error("a veth was taken for a tunnel")
		}
	})
}

func TestDeletedDeviceEndsEngine(t *testing.T) {
	testDeletedDeviceEndsEngine(t, bothEmbedded)
}

func testDeletedDeviceEndsEngine(t *testing.T, of kinds) {
	a, _ := newHosts(t, of)
	tun := a.open()
	defer tun.Close()
	a.up()
	a.ip("link del " + device0)
	select {
	case <-tun.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the engine did not notice that its device is gone")
	}
	if err := tun.Update(t.Context(), Peer{Key: newPrivate(t).Public()}); !errors.Is(err, ErrClosed) {
		t.Errorf("update: %v", err)
	}
}

func TestPortInUse(t *testing.T) {
	a, _ := newHosts(t, bothEmbedded)
	a.do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: testPort}); err != nil {
			t.Error(err)
		}
	})
	tun := a.open()
	defer tun.Close()
	var err error
	a.do(func() { err = tun.Up(t.Context()) })
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("up: %v", err)
	}
}

func TestUpdateIsIdempotent(t *testing.T) {
	testUpdateIsIdempotent(t, bothEmbedded)
}

func testUpdateIsIdempotent(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	peer := b.private.Public()
	eventually(t, 2*time.Second, "a handshake", func() bool { return a.status(peer).Up })
	before := a.status(peer)
	for range 3 {
		a.update(b.peer())
	}
	// A changed description keeps the session too.
	changed := b.peer()
	changed.AllowedIPs = append(changed.AllowedIPs, netip.MustParsePrefix("198.18.0.77/32"))
	changed.Endpoints = append(changed.Endpoints, netip.MustParseAddrPort("10.99.0.250:51820"))
	a.update(changed)
	if s := a.status(peer); s.LastHandshake != before.LastHandshake || s.Endpoint != before.Endpoint || s.AllowedIPs != 3 || !s.Up {
		t.Errorf("before %+v, after %+v", before, s)
	}
	a.update(b.peer())
	if s := a.status(peer); s.AllowedIPs != 2 {
		t.Errorf("after removal of an address: %+v", s)
	}
}

func TestAddressMovesBetweenPeers(t *testing.T) {
	testAddressMovesBetweenPeers(t, bothEmbedded)
}

func testAddressMovesBetweenPeers(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	thief := Peer{Key: newPrivate(t).Public(), AllowedIPs: b.peer().AllowedIPs[:1]}
	a.update(thief)
	if s := a.status(b.private.Public()); s.AllowedIPs != 1 {
		t.Fatalf("first holder: %+v", s)
	}
	a.update(b.peer()) // the same description as before, but no longer what is in force
	if s := a.status(b.private.Public()); s.AllowedIPs != 2 {
		t.Errorf("taken back: %+v", s)
	}
	if s := a.status(thief.Key); s.AllowedIPs != 0 {
		t.Errorf("second holder: %+v", s)
	}
}

func TestDeleteAndPrune(t *testing.T) {
	testDeleteAndPrune(t, bothEmbedded)
}

func testDeleteAndPrune(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	other := Peer{Key: newPrivate(t).Public()}
	a.update(other)
	for range 2 {
		if err := a.tunnel.Delete(t.Context(), other.Key); err != nil {
			t.Error(err)
		}
	}
	a.update(other)
	if err := a.tunnel.Prune(t.Context(), []key.Public{b.private.Public()}); err != nil {
		t.Fatal(err)
	}
	all, err := a.tunnel.Status()
	if err != nil || len(all) != 1 || all[0].Key != b.private.Public() {
		t.Errorf("after prune: %+v, %v", all, err)
	}
}

func TestRefusesPeers(t *testing.T) {
	testRefusesPeers(t, bothEmbedded)
}

func testRefusesPeers(t *testing.T, of kinds) {
	a, _ := newHosts(t, of)
	tun := a.open()
	defer tun.Close()
	k := newPrivate(t).Public()
	for name, p := range map[string]Peer{
		"no key":          {},
		"own key":         {Key: a.private.Public()},
		"wide address":    {Key: k, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}},
		"mapped address":  {Key: k, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("::ffff:1.2.3.4/128")}},
		"no address":      {Key: k, AllowedIPs: []netip.Prefix{{}}},
		"odd keepalive":   {Key: k, Keepalive: 1500 * time.Millisecond},
		"large keepalive": {Key: k, Keepalive: 24 * time.Hour},
		"many addresses":  {Key: k, AllowedIPs: make([]netip.Prefix, maxAllowedIPs+1)},
	} {
		if err := tun.Update(t.Context(), p); !errors.Is(err, ErrPeer) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := tun.Status(); err != nil || len(all) != 0 {
		t.Errorf("peers were made: %v, %v", all, err)
	}
}
