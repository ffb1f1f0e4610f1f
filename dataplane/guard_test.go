package dataplane

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

func must(t testing.TB, err error, what string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func ip(t testing.TB, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// newJudged is a dataplane with a judge and without a tunnel, in a network namespace of its own. The test's goroutine
// stays on the namespace's thread.
func newJudged(t *testing.T) *Dataplane {
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
	cfg := Config{
		Interface: "sig0", CgroupRoot: newCgroup(t), BPFFS: filepath.Join(pins, "host"), Logger: slog.New(slog.DiscardHandler),
		Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd5a:7::/48"),
	}
	judge, err := enforce.Open(enforceConfig(cfg))
	must(t, err, "open judge")
	t.Cleanup(func() { must(t, judge.Close(), "close judge") })
	return &Dataplane{cfg: cfg, judge: judge}
}

// newCgroup makes a cgroup that no process is in.
func newCgroup(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err, "read mounts")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			dir, err := os.MkdirTemp(f[1], "signet-dataplane-")
			must(t, err, "make cgroup")
			t.Cleanup(func() { must(t, unix.Rmdir(dir), "remove cgroup") })
			return dir
		}
	}
	t.Skip("no cgroup v2 is mounted")
	return ""
}

// TestGuardsOfDevicesThatAreGone: devices that come and go leave no guard, link, pin or descriptor behind.
func TestGuardsOfDevicesThatAreGone(t *testing.T) {
	d := newJudged(t)
	count := func() string {
		must(t, d.guardLinks(), "guard")
		pins, err := os.ReadDir(filepath.Join(d.cfg.BPFFS, enforce.ABI, "links"))
		must(t, err, "list pins")
		files, err := os.ReadDir("/proc/self/fd")
		must(t, err, "list descriptors")
		return fmt.Sprintf("%d guards, %d hooks, %d pins, %d descriptors", len(d.judge.Guards()), len(d.judge.Hooks()), len(pins), len(files))
	}
	count() // the first one opens what stays open
	before := count()
	for range 4 {
		ip(t, "link add v0 type veth peer name v1")
		if with := count(); with == before {
			t.Errorf("new devices are not guarded: %s", with)
		}
		ip(t, "link del v0")
		if after := count(); after != before {
			t.Errorf("%s; before the devices came %s", after, before)
		}
	}
}

// TestRepairHooks: what another tool took away is put back and named, and what cannot be put back is told once.
func TestRepairHooks(t *testing.T) {
	d := newJudged(t)
	ip(t, "link add v0 type veth peer name v1")
	must(t, d.guardLinks(), "guard")
	v0, err := net.InterfaceByName("v0")
	must(t, err, "find v0")
	guard := fmt.Sprintf("guard_ingress_%d", v0.Index)
	var told []string
	report := func(s string) { told = append(told, s) }
	attached := func(name string) bool {
		for _, h := range d.judge.Hooks() {
			if h.Name == name {
				return h.Attached
			}
		}
		return false
	}
	for _, name := range []string{"ingress", guard} {
		told = nil
		pin := filepath.Join(d.cfg.BPFFS, enforce.ABI, "links", name)
		// (enforce has the tests of links that are detached.)
		must(t, os.Remove(pin), "remove pin")
		if attached(name) {
			t.Errorf("%s is not pinned and reported attached", name)
		}
		d.repairOnce(t.Context(), report)
		d.repairHooks(report)
		if !attached(name) || len(told) != 1 || !strings.Contains(told[0], name) {
			t.Errorf("%s was repaired: %v; told %q", name, attached(name), told)
		}
		// What cannot be repaired is told once.
		must(t, os.Remove(pin), "remove pin")
		must(t, os.MkdirAll(filepath.Join(pin, "x"), 0o700), "take the pin's name")
		told = nil
		for range 3 {
			d.repairHooks(report)
		}
		if len(told) != 1 || !strings.Contains(told[0], name) {
			t.Errorf("%s cannot be repaired: told %q", name, told)
		}
		must(t, os.Remove(filepath.Join(pin, "x")), "give the name back")
		must(t, os.Remove(pin), "give the name back")
		d.repairHooks(report)
		if !attached(name) || len(told) != 2 {
			t.Errorf("%s was repaired: %v; told %q", name, attached(name), told)
		}
	}
}

// TestObservationCarriesTheProcess: a refused call is told with the process that made it.
func TestObservationCarriesTheProcess(t *testing.T) {
	o := observation(enforce.Event{Kind: enforce.EventDeny, Hook: policy.HookConnect, Local: enforce.Local{Cgroup: 5, UID: 6, PID: 7}}, nil)
	if o.PID != 7 || o.UID != 6 || o.Cgroup != 5 || o.Event != flow.EventDeny {
		t.Errorf("got %+v", o)
	}
}
