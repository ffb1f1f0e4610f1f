package tunnel

import (
	"fmt"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

func TestRoaming(t *testing.T) { testRoaming(t, bothEmbedded) }

// testRoaming moves b to another underlay address: a follows the first packet that is authentic.
func testRoaming(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	peer := b.private.Public()
	eventually(t, 5*time.Second, "a handshake", func() bool { return a.status(peer).Up && b.status(a.private.Public()).Up })
	before := a.status(peer)
	b.ip("addr add 10.99.0.12/24 dev under0")
	b.ip(fmt.Sprintf("addr del %s/24 dev under0", b.underlay())) // takes the other one away as well
	b.ip("addr replace 10.99.0.12/24 dev under0")
	if err := b.tunnel.RoutesChanged(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "traffic from the new place", func() bool {
		_, err := b.run("ping", "-c", "1", "-W", "1", a.v6().String())
		return err == nil
	})
	if s := a.status(peer); s.Endpoint.Addr().String() != "10.99.0.12" || s.LastHandshake != before.LastHandshake {
		t.Errorf("before %+v, after %+v", before, s)
	}
}

func TestRestart(t *testing.T) { testRestart(t, bothEmbedded) }

// testRestart starts each end anew, the other one running on, and then both: what they hold survives, and both are up
// without traffic.
func testRestart(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	to := b.echo(b.v6())
	up := func() bool { return a.status(b.private.Public()).Up && b.status(a.private.Public()).Up }
	eventually(t, 5*time.Second, "a handshake", up)
	for _, which := range [][]*host{{a}, {b}, {a, b}} {
		for _, h := range which {
			if err := h.tunnel.Close(); err != nil {
				t.Fatal(err)
			}
		}
		for _, h := range which {
			tun := h.open()
			t.Cleanup(func() { _ = tun.Close() })
			h.up()
		}
		for _, h := range which {
			other := map[*host]*host{a: b, b: a}[h]
			h.update(other.peer())
			if err := h.tunnel.Prune(t.Context(), []key.Public{other.private.Public()}); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, 10*time.Second, "both are up after a restart", up)
		c, err := a.dial(to, 10*time.Second)
		if err != nil {
			t.Fatalf("dial after restart: %v", err)
		}
		if err := exchange(c, 1<<16); err != nil {
			t.Errorf("exchange after restart: %v", err)
		}
		_ = c.Close()
	}
}

func TestSourceChosenAnew(t *testing.T) { testSourceChosenAnew(t, bothEmbedded) }

// testSourceChosenAnew: a route that now prefers another of this host's addresses counts once the engine is told, although
// the address that was used is still there.
func testSourceChosenAnew(t *testing.T, of kinds) {
	a, b := newPair(t, of)
	eventually(t, 5*time.Second, "a handshake", func() bool {
		return a.status(b.private.Public()).Up && b.status(a.private.Public()).Up
	})
	a.ip("addr add 10.99.0.11/24 dev under0")
	a.ip("route replace 10.99.0.0/24 dev under0 proto kernel scope link src 10.99.0.11")
	if err := a.tunnel.RoutesChanged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := a.run("ping", "-c", "1", "-W", "5", b.v4().String()); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if s := b.status(a.private.Public()); s.Endpoint.Addr().String() != "10.99.0.11" {
		t.Errorf("the peer saw %v", s.Endpoint)
	}
}
