package tunnel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/key"
)

// needKernel skips where the kernel has no WireGuard. The guests of the matrix have it: there it must work.
func needKernel(t *testing.T) {
	t.Helper()
	needRoot(t)
	var err error
	newSpace(t).do(func() { err = link.ProbeWireGuard() })
	switch {
	case err == nil:
	case os.Getenv("SIGNET_VM_GUEST") != "" || !errors.Is(err, link.ErrNoWireGuard):
		t.Fatal(err)
	default:
		t.Skipf("needs the kernel's WireGuard, which the guests of make test-vm have: %v", err)
	}
}

// mixes are all pairs with the kernel's engine at one end at least.
var mixes = []kinds{{kernel, kernel}, {kernel, embedded}, {embedded, kernel}}

// TestKernel puts the kernel's engine, by itself and with the embedded one at the other end, to the same tests.
func TestKernel(t *testing.T) {
	needKernel(t)
	for name, test := range map[string]func(*testing.T, kinds){
		"TwoHostsExchange":         testTwoHostsExchange,
		"OpenLeavesLinkDown":       testOpenLeavesLinkDown,
		"DeletedDeviceEndsEngine":  testDeletedDeviceEndsEngine,
		"UpdateIsIdempotent":       testUpdateIsIdempotent,
		"AddressMovesBetweenPeers": testAddressMovesBetweenPeers,
		"DeleteAndPrune":           testDeleteAndPrune,
		"RefusesPeers":             testRefusesPeers,
		"CandidatesAreTried":       testCandidatesAreTried,
		"Handshake":                testHandshake,
		"UnansweredIsNoticed":      testUnansweredIsNoticed,
		"RoutesChanged":            testRoutesChanged,
		"Roaming":                  testRoaming,
		"Restart":                  testRestart,
		"SourceChosenAnew":         testSourceChosenAnew,
	} {
		for _, of := range mixes {
			t.Run(name+"/"+of[0]+"-"+of[1], func(t *testing.T) { test(t, of) })
		}
	}
}

// TestKernelOutlivesAgent: without an agent the kernel carries traffic on, and the next agent takes over what is there.
func TestKernelOutlivesAgent(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, kernel})
	peer := b.private.Public()
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(peer).Up && b.status(a.private.Public()).Up })
	a.update(Peer{Key: newPrivate(t).Public(), AllowedIPs: []netip.Prefix{netip.MustParsePrefix("198.18.0.77/32")}})
	before, index := a.status(peer), linkIndex(t, a)
	for range 2 {
		if err := a.tunnel.Close(); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-a.tunnel.Done():
	default:
		t.Error("a closed engine is not done")
	}
	if err := a.tunnel.Update(t.Context(), b.peer()); !errors.Is(err, ErrClosed) {
		t.Errorf("update after close: %v", err)
	}
	for _, to := range []netip.Addr{b.v4(), b.v6()} {
		if out, err := a.run("ping", "-c", "1", "-W", "2", to.String()); err != nil {
			t.Errorf("no traffic without an agent: %v: %s", err, out)
		}
	}
	tun := a.open()
	t.Cleanup(func() { _ = tun.Close() })
	a.up()
	a.update(b.peer())
	if s := a.status(peer); !s.Up || s.LastHandshake != before.LastHandshake || s.AllowedIPs != 2 || s.RxBytes <= before.RxBytes {
		t.Errorf("before %+v, after %+v", before, s)
	}
	if all, err := tun.Status(); err != nil || len(all) != 2 {
		t.Errorf("peers taken over: %+v, %v", all, err)
	}
	if err := tun.Prune(t.Context(), []key.Public{peer}); err != nil {
		t.Fatal(err)
	}
	if all, err := tun.Status(); err != nil || len(all) != 1 {
		t.Errorf("peers after prune: %+v, %v", all, err)
	}
	if now := linkIndex(t, a); now != index {
		t.Errorf("device changed: index %s, then %s", index, now)
	}
}

// TestKernelOtherIdentity: nothing of one identity is taken over by another.
func TestKernelOtherIdentity(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, embedded})
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(b.private.Public()).Up })
	if err := a.tunnel.Close(); err != nil {
		t.Fatal(err)
	}
	a.private = newPrivate(t)
	tun := a.open()
	t.Cleanup(func() { _ = tun.Close() })
	if all, err := tun.Status(); err != nil || len(all) != 0 {
		t.Errorf("peers of the identity before: %+v, %v", all, err)
	}
	a.up()
	a.update(b.peer())
	b.update(Peer{Key: a.private.Public(), AllowedIPs: a.peer().AllowedIPs})
	eventually(t, 5*time.Second, "a handshake of the new identity", func() bool { return a.status(b.private.Public()).Up })
}

// TestKernelRefused: a peer that speaks for an address that is not bound to it is not heard, and counted for the device.
func TestKernelRefused(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, kernel})
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(b.private.Public()).Up && b.status(a.private.Public()).Up })
	k := a.tunnel.(*Kernel)
	if n, err := k.carrier.Refused(); n != 0 || err != nil {
		t.Fatalf("refused before: %d, %v", n, err)
	}
	b.ip("addr add 198.18.0.66/32 dev " + device0)
	if out, err := b.run("ping", "-I", "198.18.0.66", "-c", "2", "-W", "1", a.v4().String()); err == nil {
		t.Errorf("a forged source was answered: %s", out)
	}
	if n, err := k.carrier.Refused(); n != 2 || err != nil {
		t.Errorf("refused: %d, %v", n, err)
	}
	limits := strings.Join(k.Limits(), "\n")
	for _, says := range []string{"2 until now", "refused_source of every peer is 0", "no-setsockopt-hook"} {
		if !strings.Contains(limits, says) {
			t.Errorf("limits do not say %q: %s", says, limits)
		}
	}
}

// TestKernelMends: what another program does to peers and addresses is undone.
func TestKernelMends(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, kernel})
	peer := b.private.Public()
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(peer).Up })
	stranger := newPrivate(t).Public()
	wg := func(args ...string) {
		t.Helper()
		if out, err := a.run("wg", append([]string{"set", device0, "peer"}, args...)...); err != nil {
			t.Fatalf("wg %v: %v: %s", args, err, out)
		}
	}
	exact := func() bool {
		out, err := a.run("wg", "show", device0, "allowed-ips")
		line := strings.Fields(out)
		return err == nil && len(line) == 3 && line[0] == peer.String() && strings.Contains(out, b.v4().String()+"/32") && strings.Contains(out, b.v6().String()+"/128")
	}
	for name, do := range map[string]func(){
		"stranger":   func() { wg(stranger.String(), "allowed-ips", "198.18.0.0/16") },
		"thief":      func() { wg(stranger.String(), "allowed-ips", b.v4().String()+"/32") },
		"wider":      func() { wg(peer.String(), "allowed-ips", "0.0.0.0/0,::/0") },
		"none":       func() { wg(peer.String(), "allowed-ips", "") },
		"peer taken": func() { wg(peer.String(), "remove") },
	} {
		if do(); exact() {
			t.Fatalf("%s: nothing changed", name)
		}
		took := eventually(t, 2*kernelLook, name+": the device is as before", exact)
		t.Logf("%s: undone after %v", name, took)
	}
	eventually(t, 10*time.Second, "a handshake after all that", func() bool {
		_, err := a.run("ping", "-c", "1", "-W", "1", b.v4().String())
		return err == nil
	})
}

// TestKernelFlap: the kernel forgets its sessions when the link is set down; both ends learn of it.
func TestKernelFlap(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, kernel})
	peer := b.private.Public()
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(peer).Up })
	before := a.status(peer)
	a.ip("link set " + device0 + " down")
	eventually(t, 5*time.Second, "the session is gone", func() bool { return !a.status(peer).Up })
	a.ip("link set " + device0 + " up")
	a.up()
	took := eventually(t, 10*time.Second, "another session, without traffic", func() bool { return a.status(peer).Up })
	t.Logf("up again after %v", took)
	if s := a.status(peer); !s.LastHandshake.After(before.LastHandshake) {
		t.Errorf("before %+v, after %+v", before, s)
	}
}

// TestKernelAddressesStay changes a peer's addresses without pause while packets go to one that stays: none is lost.
func TestKernelAddressesStay(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, kernel})
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(b.private.Public()).Up && b.status(a.private.Public()).Up })
	ctx, cancel := context.WithCancel(t.Context())
	changes := make(chan error, 1)
	go func() {
		more := b.peer()
		for i := range 20 {
			more.AllowedIPs = append(more.AllowedIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, 1, byte(i)}), 32))
		}
		for ctx.Err() == nil {
			if err := errors.Join(a.tunnel.Update(t.Context(), more), a.tunnel.Update(t.Context(), b.peer())); err != nil {
				changes <- err
				return
			}
		}
		changes <- nil
	}()
	out, err := a.run("ping", "-q", "-i", "0.002", "-c", "1000", "-W", "5", b.v4().String())
	cancel()
	if err := <-changes; err != nil {
		t.Fatal(err)
	}
	if err != nil || !strings.Contains(out, " 0% packet loss") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestKernelPortInUse: a port that is taken away while no agent runs is named.
func TestKernelPortInUse(t *testing.T) {
	needKernel(t)
	a, _ := newPair(t, kinds{kernel, kernel})
	if err := a.tunnel.Close(); err != nil {
		t.Fatal(err)
	}
	a.ip("link add other0 type wireguard")
	if out, err := a.run("wg", "set", "other0", "listen-port", "51999"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	a.ip("link set other0 up")
	a.do(func() {
		_, err := openKind(t.Context(), kernel, Config{Name: device0, ListenPort: 51999, PrivateKey: a.private, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
		if err == nil || !strings.Contains(err.Error(), "UDP port 51999") {
			t.Errorf("open: %v", err)
		}
		if _, err := openKind(t.Context(), kernel, Config{Name: "other0", PrivateKey: a.private}); !errors.Is(err, link.ErrForeign) {
			t.Errorf("somebody else's device: %v", err)
		}
	})
}

// TestKernelManyAddresses: a peer with more addresses than one message holds has all of them, also after a handshake
// that makes it anew.
func TestKernelManyAddresses(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, embedded})
	peer := b.private.Public()
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(peer).Up })
	many := b.peer()
	for i := range 1000 {
		many.AllowedIPs = append(many.AllowedIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 19, byte(i / 250), byte(i % 250)}), 32))
	}
	many.Keepalive = 25 * time.Second
	count := func(want int, when string) {
		t.Helper()
		if s := a.status(peer); s.AllowedIPs != want {
			t.Errorf("%s: %d addresses, want %d", when, s.AllowedIPs, want)
		}
	}
	before := a.status(peer)
	a.update(many)
	count(1002, "added")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := a.tunnel.Handshake(ctx, peer); err != nil {
		t.Fatal(err)
	}
	count(1002, "made anew")
	if s := a.status(peer); s.RxBytes <= before.RxBytes || s.TxBytes <= before.TxBytes || !s.Up {
		t.Errorf("before %+v, after %+v", before, s)
	}
	if out, err := a.run("wg", "show", device0, "persistent-keepalive"); err != nil || !strings.Contains(out, "25") {
		t.Errorf("keepalive: %v: %s", err, out)
	}
	a.update(b.peer())
	count(2, "taken away")
	if out, err := a.run("wg", "show", device0, "peers"); err != nil || strings.TrimSpace(out) != peer.String() {
		t.Errorf("peers: %v: %s", err, out)
	}
	if out, err := a.run("ping", "-c", "1", "-W", "2", b.v4().String()); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestKernelSilence: a peer that answers no packet any more is not up, and is tried elsewhere, although nobody asks.
func TestKernelSilence(t *testing.T) {
	needKernel(t)
	a, b := newPair(t, kinds{kernel, embedded})
	p := b.peer()
	p.Endpoints = append(p.Endpoints, netip.AddrPortFrom(b.underlay6(), testPort))
	a.update(p)
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(p.Key).Up && b.status(a.private.Public()).Up })
	a.ip("neigh replace " + b.underlay().String() + " lladdr 02:00:00:00:00:99 dev under0 nud permanent")
	b.ip("neigh replace " + a.underlay().String() + " lladdr 02:00:00:00:00:99 dev under0 nud permanent")
	if out, err := a.run("ping", "-c", "3", "-W", "1", b.v4().String()); err == nil {
		t.Fatalf("the path is not broken: %s", out)
	}
	took := eventually(t, kernelSilence+3*kernelLook, "another endpoint works", func() bool {
		s := a.status(p.Key)
		return s.Up && s.Endpoint.Addr() == b.underlay6()
	})
	t.Logf("moved after %v", took)
	if out, err := a.run("ping", "-c", "1", "-W", "2", b.v4().String()); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
