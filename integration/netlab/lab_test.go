package netlab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/netlab/netlabtest"
)

// within bounds one test; nothing here takes more than a few seconds on a slow machine.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// addresses of the two hosts that pair makes.
var addrs = [2][2]netip.Prefix{
	{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")},
	{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")},
}

func pair(t *testing.T, ctx context.Context, lab *netlab.Lab) (a, b *netlab.Host) {
	t.Helper()
	sw := must[*netlab.Bridge](t)(lab.Bridge(ctx, "sw"))
	var hosts [2]*netlab.Host
	for i, name := range []string{"a", "b"} {
		hosts[i] = must[*netlab.Host](t)(lab.Host(ctx, name))
		ifname := must[string](t)(lab.Connect(ctx, hosts[i], sw, addrs[i][:]...))
		if ifname != "eth0" {
			t.Fatalf("first interface is %q, want eth0", ifname)
		}
	}
	return hosts[0], hosts[1]
}

func ping(ctx context.Context, h *netlab.Host, addr netip.Addr) error {
	return pingFor(ctx, h, addr, "5")
}

// pingFor sends until the first reply or until so many seconds have passed.
func pingFor(ctx context.Context, h *netlab.Host, addr netip.Addr, seconds string) error {
	out, err := h.Command(ctx, netlab.Opts{}, "ping", "-n", "-c1", "-i0.2", "-w"+seconds, addr.String()).Output()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

func TestHostsReachEachOther(t *testing.T) {
	ctx := within(t)
	a, b := pair(t, ctx, netlabtest.New(t))
	for i, dst := range addrs[1] {
		if err := ping(ctx, a, dst.Addr()); err != nil {
			t.Error(err)
		}
		if err := ping(ctx, b, addrs[0][i].Addr()); err != nil {
			t.Error(err)
		}
	}
}

func TestLabDoesNotTouchTheMachine(t *testing.T) {
	ctx := within(t)
	before := links(t)
	pair(t, ctx, netlabtest.New(t))
	if after := links(t); after != before {
		t.Errorf("links of the machine changed:\nbefore %s\nafter  %s", before, after)
	}
}

func links(t *testing.T) string {
	all := must[[]net.Interface](t)(net.Interfaces())
	names := make([]string, len(all))
	for i, ifi := range all {
		names[i] = ifi.Name
	}
	return strings.Join(names, " ")
}

func TestProcessIsInItsCgroupAndNamespaceFromBirth(t *testing.T) {
	ctx := within(t)
	lab := netlabtest.New(t)
	h := must[*netlab.Host](t)(lab.Host(ctx, "a"))
	// readlink and cat have no code of ours that could move them: what they see is what they were born into.
	ns := must[string](t)(h.Command(ctx, netlab.Opts{}, "readlink", "/proc/self/ns/net").Output())
	var st unix.Stat_t
	if err := unix.Stat(h.NetNS(), &st); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("net:[%d]\n", st.Ino); ns != want {
		t.Errorf("namespace is %q, want %q", ns, want)
	}
	for path, want := range map[string]string{
		"":                                  "/" + lab.Prefix() + "/a",
		"system.slice/api-server.service":   "/" + lab.Prefix() + "/a/system.slice/api-server.service",
		"system.slice/api-server.service/x": "/" + lab.Prefix() + "/a/system.slice/api-server.service/x",
	} {
		text := must[string](t)(h.Command(ctx, netlab.Opts{Cgroup: path}, "cat", "/proc/self/cgroup").Output())
		if !strings.Contains("\n"+text, "\n0::"+want+"\n") {
			t.Errorf("cgroup %q: process is in\n%swant 0::%s", path, text, want)
		}
	}
	id := must[string](t)(h.Command(ctx, netlab.Opts{UID: 12345, GID: 54321}, "id").Output())
	if !strings.HasPrefix(id, "uid=12345 gid=54321 groups=54321") {
		t.Errorf("credentials: %s", id)
	}
}

func TestEnterLine(t *testing.T) {
	ctx := within(t)
	lab := netlabtest.New(t)
	h := must[*netlab.Host](t)(lab.Host(ctx, "a"))
	must[string](t)(h.Cgroup("system.slice/x.service"))
	line := strings.TrimPrefix(h.Enter("system.slice/x.service", "sh", "-c", "cat /proc/self/cgroup; readlink /proc/self/ns/net"), "sudo ")
	out, err := exec.CommandContext(ctx, "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	if !strings.Contains(string(out), "0::/"+lab.Prefix()+"/a/system.slice/x.service\n") {
		t.Errorf("%s gave\n%s", line, out)
	}
}

func TestCgroupPathStaysBelowTheHost(t *testing.T) {
	h := must[*netlab.Host](t)(netlabtest.New(t).Host(within(t), "a"))
	for _, path := range []string{"", "/x", "..", "x/../../y"} {
		if got, err := h.Cgroup(path); err == nil {
			t.Errorf("Cgroup(%q) = %s", path, got)
		}
	}
}

func TestHostHasBPFFSOfItsOwn(t *testing.T) {
	ctx := within(t)
	lab := netlabtest.New(t)
	dirs := map[string]bool{}
	for _, name := range []string{"a", "b"} {
		h := must[*netlab.Host](t)(lab.Host(ctx, name))
		var fs unix.Statfs_t
		if err := unix.Statfs(h.BPFFS(), &fs); err != nil {
			t.Fatal(err)
		}
		if fs.Type != unix.BPF_FS_MAGIC {
			t.Errorf("%s is no bpffs (type %#x)", h.BPFFS(), fs.Type)
		}
		dirs[h.BPFFS()] = true
	}
	if len(dirs) != 2 {
		t.Errorf("hosts share a directory: %v", dirs)
	}
}

// transfer sends text from a to b over TCP and returns when b has it all.
func transfer(t *testing.T, ctx context.Context, a, b *netlab.Host, addr netip.Addr, text string) {
	t.Helper()
	ln := must[net.Listener](t)(b.Listen(ctx, "tcp", netip.AddrPortFrom(addr, 0).String()))
	defer ln.Close()
	got := make(chan string, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		defer conn.Close()
		data, err := io.ReadAll(conn)
		if err != nil {
			data = append(data, " and then "+err.Error()...)
		}
		got <- string(data)
	}()
	conn := must[net.Conn](t)(a.DialContext(ctx, "tcp", ln.Addr().String()))
	must[int](t)(io.WriteString(conn, text))
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if data := <-got; data != text {
		t.Fatalf("b got %q", data)
	}
}

func TestCaptureSeesWhatIsInClear(t *testing.T) {
	const canary, absent = "canary-in-clear-0001", "canary-nowhere-0002"
	for i, family := range []string{"v4", "v6"} {
		t.Run(family, func(t *testing.T) {
			ctx := within(t)
			a, b := pair(t, ctx, netlabtest.New(t))
			watched := must[*netlab.Capture](t)(b.Capture(ctx, "eth0", []byte(canary), []byte(absent)))
			plain := must[*netlab.Capture](t)(a.Capture(ctx, "eth0"))
			dst := addrs[1][i].Addr()
			transfer(t, ctx, a, b, dst, canary)
			for name, rec := range map[string]*netlab.Recording{"watched": watched.Stop(), "plain": plain.Stop()} {
				p, found, err := rec.Contains([]byte(canary))
				if err != nil || !found {
					t.Fatalf("%s: canary found %v, %v in %v", name, found, err, rec.Flows)
				}
				if p.Flow.Proto != unix.IPPROTO_TCP || p.Flow.Dst != dst || p.Flow.Src != addrs[0][i].Addr() || p.Flow.DstPort == 0 {
					t.Errorf("%s: canary was in %v", name, p.Flow)
				}
				if p.Outgoing != (name == "plain") {
					t.Errorf("%s: outgoing is %v", name, p.Outgoing)
				}
				if _, found, err := rec.Contains([]byte(absent)); err != nil || found {
					t.Errorf("%s: absent text found %v, %v", name, found, err)
				}
				isTCP := func(f netlab.Flow) bool { return f.Proto == unix.IPPROTO_TCP }
				if rest := rec.Except(isTCP); len(rest) > 0 {
					t.Errorf("%s: unexpected flows %v", name, rest)
				}
				if rest := rec.Except(func(netlab.Flow) bool { return false }); len(rest) != 2 {
					t.Errorf("%s: want the two directions of one connection, got %v", name, rest)
				}
			}
		})
	}
}

func TestPartitionIsSilentAndHeals(t *testing.T) {
	ctx := within(t)
	lab := netlabtest.New(t)
	a, b := pair(t, ctx, lab)
	dst4, dst6 := addrs[1][0].Addr(), addrs[1][1].Addr()
	check := func(when string, addr netip.Addr, reachable bool) {
		t.Helper()
		// After a cut the first reply has to wait for the neighbour entry's next probe, which the kernel sends every second.
		limit := "1"
		if reachable {
			limit = "5"
		}
		err := pingFor(ctx, a, addr, limit)
		if reachable != (err == nil) {
			t.Errorf("%s: %s reachable %v, want %v (%v)", when, addr, err == nil, reachable, err)
		}
		// A cut in the network looks like loss. An error at the sender would tell the program more than a network does.
		if err != nil && (!strings.Contains(err.Error(), "100% packet loss") || strings.Contains(err.Error(), "sendmsg")) {
			t.Errorf("%s: not silent: %v", when, err)
		}
	}
	apply := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check("before", dst4, true)
	apply(lab.Partition(ctx, a, b))
	check("partition", dst4, false)
	check("partition", dst6, false)
	apply(lab.Heal(ctx, a, b))
	check("healed", dst4, true)
	check("healed", dst6, true)
	apply(a.Block(ctx, dst6))
	check("block v6", dst6, false)
	check("block v6", dst4, true)
	apply(a.Unblock(ctx, dst6))
	check("unblocked", dst6, true)
	apply(a.Unplug(ctx, "eth0"))
	check("unplugged", dst4, false)
	apply(a.Plug(ctx, "eth0"))
	check("plugged", dst4, true)
	check("plugged", dst6, true)
}

func TestCommandWaits(t *testing.T) {
	ctx := within(t)
	h := must[*netlab.Host](t)(netlabtest.New(t).Host(ctx, "a"))
	if err := h.Command(ctx, netlab.Opts{}, "no-such-program").Run(); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("missing program: %v", err)
	}
	err := h.Command(ctx, netlab.Opts{}, "sh", "-c", "echo reason >&2; exit 3").Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.HasSuffix(err.Error(), ": reason") {
		t.Errorf("failing program: %v", err)
	}
	c := h.Command(ctx, netlab.Opts{Stdin: strings.NewReader("in\n")}, "sh", "-c", "read x; echo got $x; exec sleep 600")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitFor(ctx, "got in\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err == nil {
		t.Error("second Start succeeded")
	}
	if err := c.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err == nil || c.Wait() != err {
		t.Errorf("Wait after SIGKILL: %v, then %v", err, c.Wait())
	}
	if err := c.WaitFor(ctx, "never"); err == nil {
		t.Error("WaitFor found what was never written")
	}
	if err := c.Kill(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Kill after the end: %v", err)
	}
}

func TestCommandEndsWithItsContext(t *testing.T) {
	h := must[*netlab.Host](t)(netlabtest.New(t).Host(within(t), "a"))
	ctx, cancel := context.WithCancel(t.Context())
	c := h.Command(ctx, netlab.Opts{}, "sleep", "600")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := c.Wait(); err == nil {
		t.Error("sleep ended without an error")
	}
}

func noLeaks(t *testing.T, prefix string) {
	t.Helper()
	if left := must[[]string](t)(netlab.Leaks(prefix)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	ctx := within(t)
	lab := netlabtest.New(t)
	a, b := pair(t, ctx, lab)
	capture := must[*netlab.Capture](t)(a.Capture(ctx, "eth0"))
	// The second one outlives its parent, which exits at once, and is found only through the cgroup.
	stubborn := a.Command(ctx, netlab.Opts{Cgroup: "system.slice/stubborn.service"}, "sh", "-c", `trap "" TERM; echo ready; exec sleep 600`)
	orphan := b.Command(ctx, netlab.Opts{Cgroup: "x"}, "sh", "-c", `trap "" TERM; setsid sleep 600 >/dev/null 2>&1 & echo ready $!`)
	for _, c := range []*netlab.Cmd{stubborn, orphan} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if err := c.WaitFor(ctx, "ready"); err != nil {
			t.Fatal(err)
		}
	}
	if err := orphan.Wait(); err != nil {
		t.Fatal(err)
	}
	if left := must[[]string](t)(netlab.Leaks(lab.Prefix())); len(left) < 6 {
		t.Errorf("a lab in use should show 3 namespaces, their mounts, a bpffs and a cgroup, got %v", left)
	}
	if err := lab.Close(); err != nil {
		t.Error(err)
	}
	if err := lab.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	noLeaks(t, lab.Prefix())
	if err := stubborn.Wait(); err == nil {
		t.Error("the process that ignores SIGTERM ended by itself")
	}
	capture.Stop()
	if err := a.Do(func() error { return nil }); !errors.Is(err, netlab.ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
	if err := a.Command(ctx, netlab.Opts{}, "true").Run(); err == nil {
		t.Error("a program started after Close")
	}
	if _, err := lab.Host(ctx, "late"); !errors.Is(err, netlab.ErrClosed) {
		t.Errorf("Host after Close: %v", err)
	}
}

func TestCloseNamesASocketLeftOpen(t *testing.T) {
	ctx := within(t)
	if os.Geteuid() != 0 {
		t.Skip("a lab of namespaces needs root")
	}
	lab := must[*netlab.Lab](t)(netlab.New(ctx, netlab.Options{Prefix: netlabtest.Prefix(), Dir: t.TempDir()}))
	h := must[*netlab.Host](t)(lab.Host(ctx, "a"))
	ln := must[net.Listener](t)(h.Listen(ctx, "tcp", "127.0.0.1:0"))
	defer ln.Close()
	if err := lab.Close(); err == nil || !strings.Contains(err.Error(), "open inside a") {
		t.Errorf("Close with an open socket: %v", err)
	}
	noLeaks(t, lab.Prefix())
}

func TestNewRemovesWhatACrashLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a lab of namespaces needs root")
	}
	ctx := within(t)
	prefix, dir := netlabtest.Prefix(), t.TempDir()
	// The child makes a lab with a process in it and is killed before it can clean up.
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestHelperThatCrashes$", "-test.v")
	child.Env = append(os.Environ(), "NETLAB_CRASH="+prefix, "NETLAB_DIR="+dir)
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("helper: %v\n%s", err, out)
	}
	if left := must[[]string](t)(netlab.Leaks(prefix)); len(left) < 5 {
		t.Errorf("the helper left only %v", left)
	}
	lab := must[*netlab.Lab](t)(netlab.New(ctx, netlab.Options{Prefix: prefix, Dir: t.TempDir()}))
	h := must[*netlab.Host](t)(lab.Host(ctx, "a"))
	if procs := must[[]byte](t)(os.ReadFile(filepath.Join(h.CgroupRoot(), "cgroup.procs"))); len(procs) > 0 {
		t.Errorf("new host starts with processes %s", procs)
	}
	if err := lab.Close(); err != nil {
		t.Error(err)
	}
	noLeaks(t, prefix)
}

func TestHelperThatCrashes(t *testing.T) {
	prefix := os.Getenv("NETLAB_CRASH")
	if prefix == "" {
		return // not a test by itself: TestNewRemovesWhatACrashLeft runs it in a process of its own
	}
	ctx := t.Context()
	lab := must[*netlab.Lab](t)(netlab.New(ctx, netlab.Options{Prefix: prefix, Dir: os.Getenv("NETLAB_DIR")}))
	a, _ := pair(t, ctx, lab)
	if err := a.Command(ctx, netlab.Opts{Cgroup: "x"}, "sh", "-c", "exec sleep 600 >/dev/null 2>&1").Start(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {}
}

func TestPrefixesDoNotCollide(t *testing.T) {
	ctx := within(t)
	lab := netlabtest.New(t)
	if _, err := netlab.New(ctx, netlab.Options{Prefix: lab.Prefix()}); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second lab with a prefix in use: %v", err)
	}
	// The same names and addresses in two labs at once, one of whose prefixes begins with the other.
	longer := must[*netlab.Lab](t)(netlab.New(ctx, netlab.Options{Prefix: lab.Prefix() + "0"}))
	var wg sync.WaitGroup
	for _, l := range []*netlab.Lab{lab, longer} {
		wg.Go(func() {
			a, _ := pair(t, ctx, l)
			if err := ping(ctx, a, addrs[1][0].Addr()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := lab.Close(); err != nil {
		t.Error(err)
	}
	noLeaks(t, lab.Prefix())
	if left := must[[]string](t)(netlab.Leaks(longer.Prefix())); len(left) == 0 {
		t.Error("closing one lab took the other with it")
	}
	if err := longer.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(longer.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("temporary directory: %v", err)
	}
}

func TestBadNames(t *testing.T) {
	ctx := within(t)
	for _, prefix := range []string{"", "1a", "a-b", "A", "averyveryverylong", "a/b", ".."} {
		if _, err := netlab.New(ctx, netlab.Options{Prefix: prefix}); err == nil {
			t.Errorf("prefix %q was taken", prefix)
		}
	}
	lab := netlabtest.New(t)
	must[*netlab.Host](t)(lab.Host(ctx, "taken"))
	for _, name := range []string{"", "-a", "a/b", "..", "A", "taken"} {
		if _, err := lab.Host(ctx, name); err == nil {
			t.Errorf("host %q was made", name)
		}
	}
	if _, err := lab.Bridge(ctx, "taken"); err == nil {
		t.Error("a bridge took the name of a host")
	}
}
