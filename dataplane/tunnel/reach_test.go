package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCandidatesAreTried gives a peer whose first endpoints answer nothing, one of them not even routed.
func TestCandidatesAreTried(t *testing.T) {
	t.Parallel()
	testCandidatesAreTried(t, bothEmbedded)
}

func testCandidatesAreTried(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	if err := a.tunnel.Delete(t.Context(), b.private.Public()); err != nil {
		t.Fatal(err)
	}
	p := b.peer()
	p.Endpoints = slices.Concat([]netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:51820"), netip.MustParseAddrPort("10.99.0.77:51820")},
		[]netip.AddrPort{netip.AddrPortFrom(b.underlay6(), testPort)})
	silent := a.peer()
	silent.Endpoints = nil // only a can initiate
	if err := b.tunnel.Delete(t.Context(), silent.Key); err != nil {
		t.Fatal(err)
	}
	b.update(silent)
	a.update(p)
	took := eventually(t, 5*time.Second, "a handshake by the third candidate", func() bool { return a.status(p.Key).Up })
	t.Logf("third candidate reached after %v", took)
	if s := a.status(p.Key); s.Endpoint != p.Endpoints[2] {
		t.Errorf("endpoint %v", s.Endpoint)
	}
	eventually(t, time.Second, "the other end is up too", func() bool { return b.status(silent.Key).Up })
	if s := b.status(silent.Key); s.Endpoint.Addr() != a.underlay6() {
		t.Errorf("the other end: %+v", s)
	}
}

func TestHandshake(t *testing.T) {
	t.Parallel()
	testHandshake(t, bothEmbedded)
}

func testHandshake(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	peer := b.private.Public()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	first, err := a.tunnel.Handshake(ctx, peer)
	if err != nil || first <= 0 || first > time.Second {
		t.Fatalf("first: %v, %v", first, err)
	}
	eventually(t, time.Second, "the session is up", func() bool { return a.status(peer).Up })
	before := a.status(peer).LastHandshake
	second, err := a.tunnel.Handshake(ctx, peer)
	if err != nil || second <= 0 || second > time.Second {
		t.Fatalf("second, with a live session: %v, %v", second, err)
	}
	eventually(t, time.Second, "a new handshake in status", func() bool { return a.status(peer).LastHandshake.After(before) })

	if _, err := a.tunnel.Handshake(ctx, newPrivate(t).Public()); !errors.Is(err, ErrNoPeer) {
		t.Errorf("unknown peer: %v", err)
	}
	a.update(Peer{Key: newPrivate(t).Public(), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.99.0.77:51820")}})
	all, err := a.tunnel.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Key == peer {
			continue
		}
		short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := a.tunnel.Handshake(short, s.Key); !errors.Is(err, ErrNoHandshake) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dead peer: %v", err)
		}
		cancel()
	}
}

// TestUnansweredIsNoticed pins the engine's format for a retry, and shows that a dead peer is no longer up and that
// its other endpoint is tried.
func TestUnansweredIsNoticed(t *testing.T) {
	t.Parallel()
	testUnansweredIsNoticed(t, bothEmbedded)
}

func testUnansweredIsNoticed(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	peer := b.private.Public()
	eventually(t, 2*time.Second, "a handshake", func() bool { return a.status(peer).Up })
	p := b.peer()
	p.Endpoints = append(p.Endpoints, netip.AddrPortFrom(b.underlay6(), testPort))
	a.update(p)
	// IPv4 between the hosts is gone, in silence: a route would not do, since the engine keeps to the device that it last
	// reached the peer by, and the kernel then takes a destination without a route for a neighbour.
	a.ip("neigh replace " + b.underlay().String() + " lladdr 02:00:00:00:00:99 dev under0 nud permanent")
	b.ip("neigh replace " + a.underlay().String() + " lladdr 02:00:00:00:00:99 dev under0 nud permanent")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := a.tunnel.Handshake(ctx, peer); err != nil {
		t.Fatalf("no failover to IPv6: %v", err)
	}
	eventually(t, 2*time.Second, "the session is up again", func() bool { return a.status(peer).Up })
	if s := a.status(peer); s.Endpoint.Addr() != b.underlay6() {
		t.Errorf("endpoint %v", s.Endpoint)
	}
}

// lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestNoSecretsInLogs(t *testing.T) {
	a, b := newHosts(t, bothEmbedded)
	var log lockedBuffer
	var err error
	a.do(func() {
		a.tunnel, err = OpenUserspace(t.Context(), Config{
			Name: device0, ListenPort: testPort, PrivateKey: a.private,
			Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	a.up()
	a.update(b.peer())
	eventually(t, 2*time.Second, "an initiation in the log", func() bool { return strings.Contains(log.String(), "Sending handshake initiation") })
	if err := a.tunnel.Close(); err != nil {
		t.Fatal(err)
	}
	raw := a.private.Reveal()
	for _, form := range []string{fmt.Sprintf("%x", raw), fmt.Sprintf("%X", raw), fmt.Sprint(raw)} {
		if strings.Contains(log.String(), form) {
			t.Error("the private key is in the log")
		}
	}
	if !strings.Contains(log.String(), "level=DEBUG") || strings.Contains(log.String(), "level=INFO") {
		t.Errorf("levels: %s", log.String())
	}
}

func TestProbe(t *testing.T) {
	if err := probe(filepath.Join(t.TempDir(), "tun")); !errors.Is(err, ErrNoTUN) || !strings.Contains(err.Error(), "modprobe tun") {
		t.Errorf("missing: %v", err)
	}
	if err := probe("/dev/null"); !errors.Is(err, ErrNoTUN) {
		t.Errorf("another device: %v", err)
	}
	needRoot(t)
	if kind, err := Probe(); kind != "userspace" || err != nil {
		t.Errorf("%q, %v", kind, err)
	}
}

func TestNoPermission(t *testing.T) {
	needRoot(t)
	s := newSpace(t)
	s.do(func() { // the thread ends with this, and its lack of capabilities too
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
			return
		}
		_, probed := Probe()
		_, opened := OpenUserspace(t.Context(), Config{Name: device0, PrivateKey: newPrivate(t)})
		for _, err := range []error{probed, opened} {
			if !errors.Is(err, ErrNoTUN) || !strings.Contains(err.Error(), "root") {
				t.Errorf("%v", err)
			}
		}
		if ok, err := exists(device0); ok || err != nil {
			t.Errorf("something was made: %v, %v", ok, err)
		}
	})
}

func TestRoutesChanged(t *testing.T) {
	testRoutesChanged(t, bothEmbedded)
}

func testRoutesChanged(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	peer := b.private.Public()
	eventually(t, 2*time.Second, "a handshake", func() bool { return a.status(peer).Up })
	a.ip("addr add 10.99.0.11/24 dev under0")
	a.ip(fmt.Sprintf("addr del %s/24 dev under0", a.underlay())) // takes the other one away as well
	a.ip("addr replace 10.99.0.11/24 dev under0")
	before := a.status(peer)
	if err := a.tunnel.RoutesChanged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := a.run("ping", "-c", "1", "-W", "1", b.v4().String()); err != nil {
		t.Errorf("no traffic from the new address: %v: %s", err, out)
	}
	if s := a.status(peer); s.LastHandshake != before.LastHandshake || s.Endpoint != before.Endpoint {
		t.Errorf("before %+v, after %+v", before, s)
	}
	if s := b.status(a.private.Public()); s.Endpoint.Addr().String() != "10.99.0.11" {
		t.Errorf("the peer did not follow: %+v", s)
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "tun%d", "with space", "sixteen-letters-", "a:b", "a\x00"} {
		if err := checkName(name); err == nil {
			t.Errorf("%q passed", name)
		}
		if err := RemoveDevice(name); err == nil {
			t.Errorf("%q was removed", name)
		}
	}
	if err := checkName("signet0"); err != nil {
		t.Error(err)
	}
}

func TestReportSkipsSecrets(t *testing.T) {
	k := newPrivate(t).Public()
	answer := "private_key=not even hex\nlisten_port=51820\npublic_key=" + k.Hex() + "\npreshared_key=zz\nprotocol_version=1\n" +
		"endpoint=192.0.2.1:51820\nlast_handshake_time_sec=5\nlast_handshake_time_nsec=7\ntx_bytes=1\nrx_bytes=2\nallowed_ip=198.18.0.1/32\n"
	var r reportReader
	if _, err := r.Write([]byte(answer)); err != nil {
		t.Fatal(err)
	}
	want := peerReport{endpoint: endpoint1, handshake: time.Unix(5, 7), rx: 2, tx: 1, allowedIPs: 1}
	if r.report.listenPort != 51820 || r.report.peers[k] != want {
		t.Errorf("%+v", r.report)
	}
	if _, err := new(reportReader).Write([]byte("public_key=00\n")); err == nil {
		t.Error("a short key passed")
	}
}

func TestConfigTexts(t *testing.T) {
	p := Peer{Key: newPrivate(t).Public(), Keepalive: 25 * time.Second, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("198.18.0.1/32")}, Endpoints: []netip.AddrPort{endpoint1}}
	head := "public_key=" + p.Key.Hex() + "\n"
	// Addresses are given to the engine's peer itself: its text form would leave them out of what the peer may send from.
	if got, want := configCreate(p), head+"replace_allowed_ips=true\nendpoint="+p.Key.Hex()+"\npersistent_keepalive_interval=25\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := configKeepalive(p), head+"update_only=true\npersistent_keepalive_interval=25\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
