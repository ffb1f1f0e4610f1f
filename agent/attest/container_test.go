package attest

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// machine is a host of its own: a network namespace, a cgroup subtree and folders of runtimes.
type machine struct {
	t    *testing.T
	host Host
	ns   int
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	needRoot(t)
	root, _, err := FindRoot()
	if err != nil {
		t.Skipf("needs cgroup v2: %v", err)
	}
	m := &machine{t: t, host: Host{Root: filepath.Join(root, fmt.Sprintf("signet-container-test-%d", os.Getpid())), Tunnel: "signet0", Runtimes: runtimes(t)}}
	if err := os.Mkdir(m.host.Root, 0o755); err != nil {
		t.Skipf("needs a writable cgroup tree: %v", err)
	}
	t.Cleanup(func() { removeTree(m.host.Root) })
	m.ns = newNamespace(t)
	m.ip("link set lo up")
	return m
}

// removeTree removes a cgroup and those below it; their processes have ended.
func removeTree(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	for range 200 { // the kernel lets go of a process some time after it was waited for
		if err := os.Remove(dir); err == nil || os.IsNotExist(err) {
			return
		}
		<-time.After(5 * time.Millisecond)
	}
}

// inside runs f on a thread in a network namespace, which ends afterwards.
func inside(t *testing.T, ns int, f func() error) {
	t.Helper()
	errs := make(chan error, 1)
	go func() {
		goruntime.LockOSThread()
		err := unix.Setns(ns, unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		errs <- err
	}()
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
}

func newNamespace(t *testing.T) int {
	t.Helper()
	ns := -1
	errs := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread dies with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		errs <- err
	}()
	must(t, <-errs)
	t.Cleanup(func() { _ = unix.Close(ns) })
	return ns
}

func (m *machine) ip(format string, args ...any) {
	m.t.Helper()
	m.ipIn(m.ns, fmt.Sprintf(format, args...))
}

func (m *machine) ipIn(ns int, command string) {
	m.t.Helper()
	inside(m.t, ns, func() error {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", command, err, out)
		}
		return nil
	})
}

// leg makes a veth of the machine whose other end is in ns.
func (m *machine) leg(name string, ns int) {
	m.t.Helper()
	m.ip("link add %s type veth peer name p%s netns /proc/%d/fd/%d", name, name, os.Getpid(), ns)
}

// run starts a process in a cgroup and a network namespace.
func (m *machine) run(cgroup string, ns int) *exec.Cmd {
	m.t.Helper()
	dir := filepath.Join(m.host.Root, cgroup)
	must(m.t, os.MkdirAll(dir, 0o755))
	f, err := os.Open(dir)
	must(m.t, err)
	defer f.Close()
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	inside(m.t, ns, cmd.Start)
	m.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

// container runs one of Docker's, in a cgroup below its own as some runtimes do it.
func (m *machine) container(id string, ns int, labels map[string]string) *exec.Cmd {
	m.t.Helper()
	cmd := m.run("system.slice/docker-"+id+".scope/init", ns)
	put(m.t, filepath.Join(m.host.Runtimes.Docker, "containers", id, "config.v2.json"), dockerState(id, cmd.Process.Pid, labels))
	return cmd
}

func (m *machine) resolve(workloads ...mesh.Workload) (res Result) {
	m.t.Helper()
	inside(m.t, m.ns, func() error { res = NewResolver(m.host).Resolve(workloads); return nil })
	return res
}

func (m *machine) index(name string) uint32 {
	m.t.Helper()
	var index uint32
	inside(m.t, m.ns, func() error {
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
		index = req.Uint32()
		return err
	})
	return index
}

// refused checks that a workload has nothing, and says why.
func refused(t *testing.T, name string, res Result, n identity.Number, why string) {
	t.Helper()
	m := res.Matches[n]
	for _, have := range []bool{m.Matched(), slices.Contains(slices.Collect(maps.Values(res.Locals)), n), slices.Contains(slices.Collect(maps.Values(res.Interfaces)), n)} {
		if have {
			t.Errorf("%s: matched as %+v, %v, %v", name, m, res.Locals, res.Interfaces)
			return
		}
	}
	if !strings.Contains(m.Why, why) {
		t.Errorf("%s: %q, expected %q", name, m.Why, why)
	}
}

func TestInterfaces(t *testing.T) {
	m := newMachine(t)
	box := newNamespace(t)
	m.leg("leg0", box)
	m.leg("leg1", box)
	m.leg("bridged", box)
	m.leg("uplink", box)
	m.ip("link add here0 type veth peer name here1")
	m.ip("link add br0 type bridge")
	m.ip("link set bridged master br0")
	m.ip("tuntap add dev signet0 mode tun")
	m.ip("addr add 192.0.2.2/24 dev uplink")
	m.ip("link set uplink up")
	m.ipIn(box, "link set puplink up")
	m.ip("route add default via 192.0.2.1")
	for name, why := range map[string]string{
		"gone": "device missing", "here0": "other end is in this one", "br0": "of kind bridge", "bridged": "a port of br0",
		"signet0": "the tunnel", "uplink": "default route",
	} {
		res := m.resolve(workload(t, 300, "interface:"+name))
		refused(t, name, res, 300, why)
		if warned := len(res.Warnings) == 1; warned != (name != "gone") {
			t.Errorf("%s: warnings %q", name, res.Warnings)
		}
	}
	// The vocabulary has no loopback; should it come all the same, it is refused.
	lo := workload(t, 300, "interface:leg0")
	lo.Selectors[0].Value = "lo"
	refused(t, "lo", m.resolve(lo), 300, "loopback")
	both := workload(t, 300, "interface:leg0")
	both.Selectors = append(both.Selectors, policy.Selector{Kind: policy.SelectUID, Value: "5"})
	refused(t, "with a user", m.resolve(both), 300, "no other selector")

	res := m.resolve(workload(t, 300, "interface:leg0"), workload(t, 301, "interface:leg1"))
	if want := map[uint32]identity.Number{m.index("leg0"): 300, m.index("leg1"): 301}; !maps.Equal(res.Interfaces, want) || len(res.Locals) != 0 || len(res.Warnings) != 0 {
		t.Errorf("%v, %v, %q; expected %v", res.Interfaces, res.Locals, res.Warnings, want)
	}
	if got := res.Matches[300]; !got.Matched() || got.Device != "leg0" || got.Cgroups() != nil {
		t.Errorf("leg0 is %+v", got)
	}
	res = m.resolve(workload(t, 300, "interface:leg0"), workload(t, 301, "interface:leg0"), workload(t, 302, "interface:leg1"))
	refused(t, "two with one device", res, 300, "device leg0 leads to app/w300 and app/w301")
	refused(t, "two with one device", res, 301, "device leg0 leads to app/w300 and app/w301")
	if len(res.Interfaces) != 1 || len(res.Warnings) != 1 {
		t.Errorf("%v, %q", res.Interfaces, res.Warnings)
	}
}

func TestContainers(t *testing.T) {
	m := newMachine(t)
	web := map[string]string{"app": "web", "tier": "front", "note": "a=b\n\x1b[31m\"},{"}
	box, other := newNamespace(t), newNamespace(t)
	m.leg("vweb", box)
	m.container(idA, box, web)
	m.container(idB, m.ns, map[string]string{"app": "host"})
	scope := func(id string) string { return "/system.slice/docker-" + id + ".scope" }
	key := func(id string) policy.LocalKey {
		return policy.LocalKey{Cgroup: inode(t, m.host.Root+scope(id)), UID: policy.AnyUID}
	}
	res := m.resolve(workload(t, 300, "container:app=web", "container:tier=front"), workload(t, 301, "container:app=host"), workload(t, 302, "container:app=none"))
	if res.Locals[key(idA)] != 300 || res.Locals[key(idB)] != 301 || len(res.Locals) != 2 {
		t.Errorf("cgroups: %v", res.Locals)
	}
	if len(res.Interfaces) != 1 || res.Interfaces[m.index("vweb")] != 300 || res.Matches[300].Device != "vweb" || res.Matches[301].Device != "" {
		t.Errorf("devices: %v, %+v", res.Interfaces, res.Matches)
	}
	refused(t, "no such label", res, 302, "no running container has app=none")
	if got := res.Matches[300].Cgroups(); len(got) != 1 || got[0] != scope(idA) || len(res.Warnings) != 0 {
		t.Errorf("cgroups %q, warnings %q", got, res.Warnings)
	}
	for name, c := range map[string]struct {
		selectors []string
		why       string
	}{
		"half of the labels":   {[]string{"container:app=web", "container:tier=back"}, "no running container"},
		"elsewhere":            {[]string{"container:app=web", "cgroup:/machine.slice"}, "no running container"},
		"with a user":          {[]string{"container:app=web", "uid:5"}, "leave uid out"},
		"the label's own line": {[]string{"container:note=a"}, "no running container"},
	} {
		refused(t, name, m.resolve(workload(t, 300, c.selectors...)), 300, c.why)
	}
	if res := m.resolve(workload(t, 300, "container:app=web", "cgroup:/system.slice")); !res.Matches[300].Matched() {
		t.Errorf("with its slice: %+v", res.Matches[300])
	}
	if res := m.resolve(workload(t, 301, "container:app=host", "uid:5")); res.Locals[policy.LocalKey{Cgroup: key(idB).Cgroup, UID: 5}] != 301 {
		t.Errorf("on the host's network, with a user: %v", res.Locals)
	}
	res = m.resolve(workload(t, 300, "container:app=web"), workload(t, 301, "interface:vweb"))
	refused(t, "by label and by device", res, 300, "device vweb leads to app/w300 and app/w301")
	refused(t, "by label and by device", res, 301, "device vweb leads to")

	// A second device makes the choice the operator's; a bridge port is none.
	m.leg("vtwo", box)
	refused(t, "two devices", m.resolve(workload(t, 300, "container:app=web")), 300, "say which one carries the overlay with interface:NAME")
	m.ip("link add br0 type bridge")
	m.ip("link set vtwo master br0")
	if res := m.resolve(workload(t, 300, "container:app=web")); res.Matches[300].Device != "vweb" {
		t.Errorf("beside a port of a bridge: %+v", res.Matches[300])
	}
	m.ip("link del vweb")
	refused(t, "a port of a bridge alone", m.resolve(workload(t, 300, "container:app=web")), 300, "vtwo is a port of br0")
	m.leg("vweb", box)

	// Who shares a namespace shares what arrives from it.
	m.container(idC, box, map[string]string{"app": "sidecar", "pod": "p"})
	refused(t, "a namespace that is shared", m.resolve(workload(t, 300, "container:app=web")), 300, "shares the network namespace")
	m.container(idC, other, map[string]string{"app": "web"})
	refused(t, "two namespaces", m.resolve(workload(t, 300, "container:app=web")), 300, "one address of each family")
}

func TestPod(t *testing.T) {
	m := newMachine(t)
	box := newNamespace(t)
	m.leg("vpod", box)
	m.container(idA, box, map[string]string{"pod": "p", "name": "pause"})
	m.container(idB, box, map[string]string{"pod": "p", "name": "main"})
	res := m.resolve(workload(t, 300, "container:pod=p"))
	if len(res.Locals) != 2 || len(res.Interfaces) != 1 || len(res.Matches[300].Cgroups()) != 2 || len(res.Warnings) != 0 {
		t.Errorf("%v, %v, %+v, %q", res.Locals, res.Interfaces, res.Matches, res.Warnings)
	}
}

// TestContainerLookAlikes: a cgroup of the right name is not a container, and what is inside one is not another.
func TestContainerLookAlikes(t *testing.T) {
	m := newMachine(t)
	real := m.container(idA, m.ns, map[string]string{"app": "web"})
	one := workload(t, 300, "container:app=web")
	if res := m.resolve(one); len(res.Locals) != 1 {
		t.Fatalf("the container itself: %v, %+v", res.Locals, res.Matches)
	}
	// Another's directory of the same name, with processes of theirs, while the real one ends.
	forged := "system.slice/evil.service/docker-" + idA + ".scope"
	m.run(forged, m.ns)
	if res := m.resolve(one); len(res.Locals) != 1 || res.Locals[policy.LocalKey{Cgroup: inode(t, filepath.Join(m.host.Root, "system.slice/docker-"+idA+".scope")), UID: policy.AnyUID}] != 300 {
		t.Errorf("with a forged cgroup: %v", res.Locals)
	}
	must(t, real.Process.Kill())
	_ = real.Wait()
	refused(t, "a forged cgroup alone", m.resolve(one), 300, "no running container")
	// Inside another container, whose root is the host's.
	m.container(idB, m.ns, map[string]string{"app": "other"})
	nested := m.run("system.slice/docker-"+idB+".scope/init/docker-"+idC+".scope", m.ns)
	put(t, filepath.Join(m.host.Runtimes.Docker, "containers", idC, "config.v2.json"), dockerState(idC, nested.Process.Pid, map[string]string{"app": "web"}))
	refused(t, "a cgroup inside a container", m.resolve(one), 300, "no running container")
	// In a directory of another user.
	put(t, filepath.Join(m.host.Runtimes.Docker, "containers", idC, "config.v2.json"), dockerState(idC, m.run("user.slice/docker-"+idC+".scope", m.ns).Process.Pid, map[string]string{"app": "web"}))
	if res := m.resolve(one); !res.Matches[300].Matched() {
		t.Fatalf("in a directory of root: %+v", res.Matches[300])
	}
	must(t, os.Chown(filepath.Join(m.host.Root, "user.slice"), 1000, 1000))
	refused(t, "in a directory of another user", m.resolve(one), 300, "no running container")
}

// TestWatcherSeesContainersAndDevices: each change is reported within a second.
func TestWatcherSeesContainersAndDevices(t *testing.T) {
	m := newMachine(t)
	box := newNamespace(t)
	w := NewWatcher(m.host, slog.New(slog.DiscardHandler))
	reports := make(chan Result, 256)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		goruntime.LockOSThread()
		if err := unix.Setns(m.ns, unix.CLONE_NEWNET); err == nil {
			_ = w.Run(ctx, func(r Result) { reports <- r })
		}
	}()
	defer func() { cancel(); <-done }()
	w.Look([]mesh.Workload{workload(t, 300, "interface:leg0"), workload(t, 301, "container:app=web")})
	until := func(what string, ok func(Result) bool) {
		t.Helper()
		began := time.Now()
		for {
			select {
			case r := <-reports:
				if ok(r) {
					t.Logf("%s: after %v", what, time.Since(began))
					return
				}
			case <-time.After(time.Second):
				t.Fatalf("%s: no report within a second", what)
			}
		}
	}
	matched := func(n identity.Number, want bool) func(Result) bool {
		return func(r Result) bool { m, ok := r.Matches[n]; return ok && m.Matched() == want }
	}
	until("the first look", matched(300, false))
	m.leg("leg0", box)
	until("a device that comes", matched(300, true))
	m.ip("link set leg0 name leg9")
	until("a device that is renamed", matched(300, false))
	m.ip("link set leg9 name leg0")
	until("and back", matched(300, true))
	m.ip("link del leg0")
	until("a device that goes", matched(300, false))
	cmd := m.container(idA, m.ns, map[string]string{"app": "web"})
	until("a container that starts", matched(301, true))
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	removeTree(filepath.Join(m.host.Root, "system.slice", "docker-"+idA+".scope"))
	until("a container that ends", matched(301, false))
}
