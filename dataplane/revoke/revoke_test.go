package revoke

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// each tells a story of every mechanism on a host of its own.
func each(t *testing.T, story func(*testing.T, *lab, Kind)) {
	for _, k := range kinds {
		t.Run(string(k), func(t *testing.T) { story(t, newLab(t), k) })
	}
}

// TestMPTCP: where both ends speak MPTCP the kernel ends the only path and keeps the connection for close_timeout, in case
// another path comes up; then the applications learn.
func TestMPTCP(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		must(t, os.WriteFile("/proc/sys/net/mptcp/close_timeout", []byte("1"), 0), "shorten close_timeout (Linux 6.7)")
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		l.tcpView(80)
		pair(a, "c", b, "s", "mptcp4", "mptcp4", "198.18.0.6:80")
		l.apply(l.view())
		l.sweep(r, 2)
		a.want("ECONNABORTED|ECONNRESET|ended without an error", "fate c 3000")
		b.want("ECONNABORTED|ECONNRESET|ended without an error", "fate s 3000")
	})
}

// tcpView allows TCP from A to B on some ports.
func (l *lab) tcpView(ports ...uint16) {
	l.t.Helper()
	v := l.view()
	for _, p := range ports {
		permit(v, uint32(p), numA, numB, flow.TCP, p)
	}
	l.apply(v)
}

// TestTCP: what a rule no longer allows ends at both ends, and nothing else does.
func TestTCP(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		for _, c := range []struct{ kind, kept, gone, outside string }{
			{"tcp4", "198.18.0.6:80", "198.18.0.6:81", "127.0.0.1:81"},
			{"tcp6", "[fd5a:7::6]:80", "[fd5a:7::6]:81", "[::1]:81"},
			{"tcp6", "[::ffff:198.18.0.6]:80", "[::ffff:198.18.0.6]:81", "[::ffff:127.0.0.1]:81"},
			// Go listens so unless told otherwise; a client without MPTCP gets plain TCP.
			{"mptcp4", "198.18.0.6:80", "198.18.0.6:81", "127.0.0.1:81"},
		} {
			client := strings.TrimPrefix(c.kind, "mp")
			l.tcpView(80, 81)
			pair(a, "kept", b, "kept", c.kind, client, c.kept)
			pair(a, "gone", b, "gone", c.kind, client, c.gone)
			pair(a, "outside", b, "outside", c.kind, client, c.outside)
			l.sweep(r, 0)
			a.alive("kept", "gone", "outside")

			l.tcpView(80)
			began := time.Now()
			l.sweep(r, 2)
			a.ended("gone")
			b.ended("gone")
			t.Logf("%s to %s: both ends knew after %v", client, c.gone, time.Since(began))
			a.alive("kept", "outside")
			b.alive("kept", "outside", "lkept", "lgone", "loutside")
			talk(a, "kept", b, "kept")
			talk(a, "outside", b, "outside")
			l.sweep(r, 0)

			// The listener takes connections again once it may.
			l.tcpView(81)
			a.want("ok", "connect again %s %s", client, c.gone)
			b.want("ok", "accept again lgone")
			talk(a, "again", b, "again")
			l.sweep(r, 2) // and now the other rule is gone
			a.ended("kept")
			b.ended("kept")
			for _, s := range []string{"lkept", "lgone", "loutside", "again", "outside"} {
				b.want("ok", "close %s", s)
			}
			a.want("ok", "close again")
		}
	})
}

// TestUDP: a connected socket is told; one without a connection is not, since other peers may use it.
func TestUDP(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		both := l.view()
		permit(both, 11, numA, numB, flow.UDP, 80)
		permit(both, 12, numA, numB, flow.UDP, 81)
		one := l.view()
		permit(one, 11, numA, numB, flow.UDP, 80)
		for _, c := range []struct{ kind, kept, gone, free, outside string }{
			{"udp4", "198.18.0.6:80", "198.18.0.6:81", "198.18.0.6:82", "127.0.0.1:81"},
			{"udp6", "[fd5a:7::6]:80", "[fd5a:7::6]:81", "[fd5a:7::6]:82", "[::1]:81"},
			{"udp6", "[::ffff:198.18.0.6]:80", "[::ffff:198.18.0.6]:81", "[::ffff:198.18.0.6]:82", "[::ffff:127.0.0.1]:81"},
		} {
			l.apply(both)
			pair(a, "kept", b, "kept", c.kind, c.kind, c.kept)
			pair(a, "gone", b, "gone", c.kind, c.kind, c.gone)
			pair(a, "outside", b, "outside", c.kind, c.kind, c.outside)
			b.want("ok", "listen free %s %s", c.kind, c.free)
			l.sweep(r, 0)

			l.apply(one)
			l.sweep(r, 2)
			a.ended("gone")
			b.ended("lgone")
			a.alive("kept", "outside")
			b.alive("lkept", "loutside", "free")
			talk(a, "kept", b, "lkept")
			talk(a, "outside", b, "loutside")
			for _, s := range []string{"lkept", "lgone", "loutside", "free"} {
				b.want("ok", "close %s", s)
			}
			a.want("ok", "close kept")
		}
	})
}

// TestUDPUntracked: who opened an idle UDP flow is forgotten, so that either direction's rule keeps the socket.
func TestUDPUntracked(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		v := l.view()
		permit(v, 11, numA, numB, flow.UDP, 80)
		l.apply(v)
		pair(a, "c", b, "s", "udp4", "udp4", "198.18.0.6:80")
		l.forget()
		l.sweep(r, 0)
		l.apply(l.view())
		l.sweep(r, 2)
		a.ended("c")
		b.ended("ls")
	})
}

// forget empties the judge's table, as time does.
func (l *lab) forget() {
	l.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(l.cfg.BPFFS, enforce.ABI, "maps", bpf.RevokeMapConns4), nil)
	must(l.t, err, "open conns")
	defer m.Close()
	var key bpf.JudgeTuple4
	for m.NextKey(nil, &key) == nil {
		must(l.t, m.Delete(key), "forget a connection")
	}
}

// TestTCPUntracked: the judge denies a connection that it does not know, whatever rules say, and no packet will bring it
// back.
func TestTCPUntracked(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		l.tcpView(80)
		pair(a, "c", b, "s", "tcp4", "tcp4", "198.18.0.6:80")
		l.forget()
		l.sweep(r, 2)
		a.ended("c")
		b.ended("s")
	})
}

// TestDirection: a rule for the same two workloads the other way round does not keep a connection.
func TestDirection(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		l.tcpView(80)
		pair(a, "c", b, "s", "tcp4", "tcp4", "198.18.0.6:80")
		v := l.view()
		permit(v, 12, numB, numA, flow.AnyProto, 0)
		l.apply(v)
		l.sweep(r, 2)
		a.ended("c")
		b.ended("s")
	})
}

// TestOpening: a connect that nobody has answered yet fails at once when the peer is taken back, and goes on otherwise.
func TestOpening(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a := l.revoker(k), l.start("a")
		v := l.view()
		permit(v, 11, numA, numRemote, flow.TCP, 80)
		l.apply(v)
		a.want("pending", "connect c tcp4 198.18.1.9:80")
		a.want("pending", "connect d tcp6 [fd5a:7::1:9]:80")
		l.sweep(r, 0)
		l.forget() // the first packet may not have been sent
		l.sweep(r, 0)
		v = l.view()
		permit(v, 11, numA, numRemote, flow.TCP, 80)
		gone := v.Addresses[remote4]
		gone.Revoked = true
		v.Addresses[remote4] = gone
		l.apply(v)
		l.sweep(r, 1)
		a.ended("c")
		a.alive("d")
	})
}

// TestLease: the end of the lease takes everything back in mode deny-all, and nothing in mode deny-new.
func TestLease(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		view := func(lease policy.Lease) {
			v := l.view()
			v.Lease = lease
			permit(v, 11, numA, numB, flow.TCP, 80)
			permit(v, 12, numA, numB, flow.UDP, 80)
			l.apply(v)
		}
		view(policy.Lease{Ends: time.Now().Add(time.Hour)})
		pair(a, "tcp", b, "tcp", "tcp4", "tcp4", "198.18.0.6:80")
		pair(a, "udp", b, "udp", "udp6", "udp6", "[fd5a:7::6]:80")
		over := time.Now().Add(-time.Second)
		view(policy.Lease{Ends: over, Mode: policy.LeaseDenyNew})
		l.sweep(r, 0)
		talk(a, "tcp", b, "tcp")
		view(policy.Lease{Ends: over, Mode: policy.LeaseDenyAll})
		l.sweep(r, 4)
		a.ended("tcp", "udp")
		b.ended("tcp", "ludp")
	})
}

// TestExpires: a rule that ends by itself ends its connections with the next sweep.
func TestExpires(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		v := l.view()
		ends := time.Now().Add(400 * time.Millisecond)
		slot(v, policy.Slot{Rule: 11, NotAfter: ends}, numA, numB, flow.TCP, 80)
		l.apply(v)
		pair(a, "c", b, "s", "tcp4", "tcp4", "198.18.0.6:80")
		n := 0
		for n == 0 && time.Now().Before(ends.Add(2*time.Second)) {
			var err error
			n, err = r.Sweep(context.Background())
			must(t, err, "sweep")
			if n > 0 && time.Now().Before(ends) {
				t.Error("swept before the rule ended")
			}
		}
		a.ended("c")
		b.ended("s")
	})
}

// TestFirstView: nothing is taken back before anything was decided; then what stood before the judge goes, since the judge
// does not know it.
func TestFirstView(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		a, b := l.start("a"), l.start("b")
		pair(a, "c", b, "s", "tcp4", "tcp4", "198.18.0.6:80")
		l.enforce()
		r := l.revoker(k)
		l.sweep(r, 0)
		a.alive("c")
		l.tcpView(80)
		l.sweep(r, 2)
		a.ended("c")
		b.ended("s")
		must(t, l.judge.DenyAll(), "deny all")
		l.sweep(r, 0)
		b.alive("ls")
	})
}

// TestClosed: a connection that its process has let go has nobody left to tell; the other end has.
func TestClosed(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r, a, b := l.revoker(k), l.start("a"), l.start("b")
		l.tcpView(80)
		pair(a, "c", b, "s", "tcp4", "tcp4", "198.18.0.6:80")
		a.want("ok", "close c")
		b.want("", "recv s") // the end of what A sends
		l.apply(l.view())
		l.sweep(r, 1)
		b.ended("s")
	})
}

// TestCancelled: a sweep that is not wanted any more says so.
func TestCancelled(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r := l.revoker(k)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := r.Sweep(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("sweep: %v", err)
		}
	})
}

// TestNamespace: a sweep of another namespace would find nothing and say nothing.
func TestNamespace(t *testing.T) {
	each(t, func(t *testing.T, l *lab, k Kind) {
		l.enforce()
		r := l.revoker(k)
		must(t, unix.Unshare(unix.CLONE_NEWNET), "new network namespace")
		if _, err := r.Sweep(context.Background()); !errors.Is(err, ErrNamespace) {
			t.Errorf("sweep in another namespace: %v", err)
		}
	})
}

// TestOpen: what a host lacks is told, and a Revoker without a way does nothing.
func TestOpen(t *testing.T) {
	good := Config{Maps: t.TempDir(), Overlay4: overlay4, Overlay6: overlay6}
	r, err := Open(good)
	must(t, err, "open without maps")
	if r.Kind() != KindNone || !strings.Contains(r.Why(), string(KindIterator)) || !strings.Contains(r.Why(), string(KindDiag)) {
		t.Errorf("kind %s because %q", r.Kind(), r.Why())
	}
	if n, err := r.Sweep(context.Background()); n != 0 || err != nil {
		t.Errorf("sweep: %d, %v", n, err)
	}
	must(t, r.Close(), "close")
	must(t, r.Close(), "close again")
	if _, err := r.Sweep(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("sweep after close: %v", err)
	}
	for name, spoil := range map[string]func(*Config){
		"no maps":          func(c *Config) { c.Maps = "" },
		"no IPv4":          func(c *Config) { c.Overlay4 = overlay6 },
		"every address":    func(c *Config) { c.Overlay6 = netip.MustParsePrefix("::/0") },
		"unknown kind":     func(c *Config) { c.Only = "poke" },
		"prefixes swapped": func(c *Config) { c.Overlay4, c.Overlay6 = c.Overlay6, c.Overlay4 },
	} {
		bad := good
		spoil(&bad)
		if _, err := Open(bad); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
