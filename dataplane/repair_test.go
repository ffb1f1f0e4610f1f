package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
)

// newHostConfig makes a network namespace with an underlay, and a bpffs. The test's goroutine stays on its thread.
func newHostConfig(t testing.TB) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces and devices")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	must(t, unix.Unshare(unix.CLONE_NEWNET), "new network namespace")
	pins := filepath.Join(t.TempDir(), "bpf")
	must(t, os.Mkdir(pins, 0o700), "make pins")
	must(t, unix.Mount("bpf", pins, "bpf", 0, ""), "mount bpffs")
	t.Cleanup(func() { must(t, unix.Unmount(pins, unix.MNT_DETACH), "unmount bpffs") })
	for _, c := range []string{"link set lo up", "link add under0 type veth peer name far0", "addr add 10.99.0.1/24 dev under0", "link set under0 up", "link set far0 up"} {
		ip(t, c)
	}
	private, err := key.NewPrivate()
	must(t, err, "make key")
	return Config{
		Interface: "sig0", ListenPort: 51999, MTU: DefaultMTU, PrivateKey: private, CgroupRoot: newCgroup(t), BPFFS: filepath.Join(pins, "host"),
		Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd5a:7::/48"), Logger: slog.New(slog.DiscardHandler),
	}
}

// openHost opens a dataplane with an address and a peer.
func openHost(t testing.TB, cfg Config) (*Dataplane, key.Public) {
	t.Helper()
	d, err := Open(t.Context(), cfg)
	must(t, err, "open")
	t.Cleanup(func() { must(t, d.Close(), "close") })
	self := mesh.Self{Addresses: []netip.Addr{netip.MustParseAddr("198.18.0.1")}, Overlay4: cfg.Overlay4, Overlay6: cfg.Overlay6}
	must(t, d.UpdateHost(t.Context(), self, []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd5a:7::5")}), "update host")
	other, err := key.NewPrivate()
	must(t, err, "make key")
	must(t, d.UpdatePeer(t.Context(), mesh.Peer{Key: other.Public(), AllowedIPs: []netip.Addr{netip.MustParseAddr("198.18.1.9")}}), "update peer")
	return d, other.Public()
}

// repairing runs Repair in the test's namespace, and hands on what it tells.
func repairing(t *testing.T, d *Dataplane) <-chan string {
	t.Helper()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err, "open namespace")
	told := make(chan string, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := unix.Setns(home, unix.CLONE_NEWNET)
		if err == nil {
			err = d.Repair(ctx, func(s string) { told <- s })
		}
		ended <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("repair: %v", err)
		}
		unix.Close(home)
	})
	return told
}

// within is how soon damage must be told and mended.
const within = time.Second

// damage is what another tool does to a host.
type damage struct {
	what string
	do   func(t *testing.T, d *Dataplane)
	says []string // by one sentence
}

func run(args ...string) func(*testing.T, *Dataplane) {
	return func(t *testing.T, _ *Dataplane) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}

func sh(command string) func(*testing.T, *Dataplane) { return run("sh", "-c", command) }

func linkPin(d *Dataplane, name string) string {
	return filepath.Join(d.cfg.BPFFS, enforce.ABI, "links", name)
}

func unpin(name string) func(*testing.T, *Dataplane) {
	return func(t *testing.T, d *Dataplane) { must(t, os.Remove(linkPin(d, name)), "remove pin") }
}

func detach(name string) func(*testing.T, *Dataplane) {
	return func(t *testing.T, d *Dataplane) { run("bpftool", "link", "detach", "pinned", linkPin(d, name))(t, d) }
}

// common damages are the same however devices are judged.
var common = []damage{
	{"set down", sh("ip link set sig0 down"), []string{"sig0 was set down"}},
	{"MTU", sh("ip link set sig0 mtu 1300"), []string{"MTU of sig0 was set to 1300"}},
	{"address removed", sh("ip addr del 198.18.0.1/32 dev sig0"), []string{"address 198.18.0.1 of sig0 is gone"}},
	{"address added", sh("ip addr add 192.0.2.1/32 dev sig0"), []string{"address 192.0.2.1/32 was added to sig0"}},
	{"route removed", sh("ip route del 198.18.0.0/15 dev sig0"), []string{"route 198.18.0.0/15 through sig0", "is gone"}},
	{"fallback removed", sh("ip route del unreachable 198.18.0.0/15 metric 4294967295"), []string{"denying route 198.18.0.0/15", "is gone"}},
	{"IPv6 route removed", sh("ip -6 route del fd5a:7::/48 dev sig0"), []string{"route fd5a:7::/48 through sig0", "is gone"}},
	{"pin removed", unpin("ingress"), []string{"hook ingress at cgroup", "not pinned"}},
	{"cgroup link detached", detach("egress"), []string{"hook egress at cgroup", "detached"}},
	{"device removed", sh("ip link del sig0"), []string{"device sig0 was removed by somebody else and was made anew"}},
	{"device removed again", sh("ip link del sig0"), []string{"device sig0 was removed by somebody else and was made anew"}},
}

// TestRepair is the hostile neighbour (F-41): whatever somebody takes away is told by name and back within a second.
func TestRepair(t *testing.T) {
	for name, more := range map[string][]damage{
		"tcx": {
			{"guard detached", func(t *testing.T, d *Dataplane) { detach(guardOf(t, d, "egress"))(t, d) }, []string{"at device under0", "detached"}},
			{"tunnel detached", detach("tunnel_ingress"), []string{"hook tunnel_ingress at device sig0", "detached"}},
		},
		"clsact": {
			{"tunnel flushed", sh("tc filter del dev sig0 egress"), []string{"hook tunnel_egress at device sig0", "not attached"}},
			{"guard flushed", sh("tc qdisc del dev under0 clsact"), []string{"at device under0", "not attached"}},
			{"loopback replaced", sh("echo '1,6 0 0 0' | tc filter replace dev lo egress prio 1 handle 0x51670003 protocol all bpf da bytecode-file /dev/stdin"),
				[]string{"hook lo_egress at device lo"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := newHostConfig(t)
			cfg.Clsact = name == "clsact"
			d, peer := openHost(t, cfg)
			if clsact := slices.Contains(d.Status().Warnings, clsactMeans); clsact != cfg.Clsact {
				t.Errorf("status says that clsact is used: %v", clsact)
			}
			told := repairing(t, d)
			for _, c := range slices.Concat(more, common, more) {
				c.do(t, d)
				awaitTold(t, told, c)
				awaitWhole(t, d, c.what)
			}
			peers, err := d.Peers()
			must(t, err, "peers")
			if len(peers) != 1 || peers[0].Key != peer || d.tunnel().ListenPort() != cfg.ListenPort {
				t.Errorf("after all that: peers %v on port %d", peers, d.tunnel().ListenPort())
			}
		})
	}
}

func guardOf(t *testing.T, d *Dataplane, side string) string {
	t.Helper()
	i, err := net.InterfaceByName("under0")
	must(t, err, "find under0")
	return fmt.Sprintf("guard_%s_%d", side, i.Index)
}

// awaitTold takes sentences until one says what was done.
func awaitTold(t *testing.T, told <-chan string, c damage) {
	t.Helper()
	limit := time.NewTimer(within)
	defer limit.Stop()
	var all []string
	for {
		select {
		case s := <-told:
			all = append(all, s)
			if !slices.ContainsFunc(c.says, func(part string) bool { return !strings.Contains(s, part) }) {
				return
			}
		case <-limit.C:
			t.Fatalf("%s: not told within %v, but %q", c.what, within, all)
		}
	}
}

// awaitWhole waits until nothing is wrong with the host: its hooks, device, addresses and routes.
func awaitWhole(t *testing.T, d *Dataplane, what string) {
	t.Helper()
	var wrong string
	for end := time.Now().Add(within); time.Now().Before(end); {
		wrong = ""
		for _, h := range d.Status().Hooks {
			if !h.Attached {
				wrong += fmt.Sprintf("%s: %s; ", h.Name, h.Error)
			}
		}
		d.host.mu.Lock()
		differs, err := link.Differences(t.Context(), d.host.spec)
		d.host.mu.Unlock()
		if wrong += strings.Join(differs, "; "); wrong == "" && err == nil {
			return
		}
		runtime.Gosched()
	}
	t.Fatalf("%s: %v later: %s", what, within, wrong)
}

// TestDeviceNameTaken: a device of somebody else in the tunnel's place is never taken for it; what is wrong is told once,
// and ends when the name is free.
func TestDeviceNameTaken(t *testing.T) {
	d, _ := openHost(t, newHostConfig(t))
	ip(t, "link del sig0")
	ip(t, "link add sig0 type veth peer name sig0far")
	told := repairing(t, d)
	awaitTold(t, told, damage{what: "name taken", says: []string{"cannot be made anew"}})
	if d.Status().Healthy {
		t.Error("the host is healthy without its tunnel")
	}
	if again := drain(told, 2*hookTick); slices.ContainsFunc(again, func(s string) bool { return strings.Contains(s, "cannot be made anew") }) {
		t.Errorf("told again: %q", again)
	}
	ip(t, "link del sig0")
	awaitTold(t, told, damage{what: "name free", says: []string{"was made anew"}})
	awaitWhole(t, d, "name free")
}

// drain takes what is told within a time.
func drain(told <-chan string, wait time.Duration) (all []string) {
	limit := time.NewTimer(wait)
	defer limit.Stop()
	for {
		select {
		case s := <-told:
			all = append(all, s)
		case <-limit.C:
			return all
		}
	}
}

// BenchmarkLook is what an idle host pays for each look at its hooks, with 18 guarded devices.
func BenchmarkLook(b *testing.B) {
	for _, clsact := range []bool{false, true} {
		b.Run(fmt.Sprintf("clsact=%v", clsact), func(b *testing.B) {
			cfg := newHostConfig(b)
			cfg.Clsact = clsact
			d, _ := openHost(b, cfg)
			for i := range 8 {
				ip(b, fmt.Sprintf("link add more%d type veth peer name other%d", i, i))
			}
			must(b, d.guardLinks(), "guard")
			b.ReportMetric(float64(len(d.judge.Hooks())), "hooks")
			for b.Loop() {
				d.repairHooks(func(s string) { b.Error(s) })
			}
		})
	}
}
