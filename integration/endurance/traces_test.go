package endurance

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

// device is the tunnel's.
const device = "signet0"

// listing is everything of a host that Signet promises not to touch, by what shows it, each as a sorted list of lines.
type listing map[string][]string

// TestNoTraces lists a host's firewall, routes, rules, resolver, sysctls, queueing, filters and BPF programs before Signet
// comes, while it works and after it has gone: nothing may differ but what is its own, and in the end nothing at all.
func TestNoTraces(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	c := startCoordinator(ctx, t, "traces", "")
	a, err := c.MakeHost(ctx, "db-1")
	must(t, err)
	peer, err := c.AddHost(ctx, "api-1")
	must(t, err)
	for _, unit := range []string{scenario.APIServer, scenario.Postgres, "system.slice/signetd.service"} {
		for _, h := range []*scenario.Agent{a, peer} {
			_, err := h.Host.Cgroup(unit)
			must(t, err)
		}
	}
	furnish(ctx, t, a)
	before := list(ctx, t, a)
	for _, kind := range []string{"nft", "routes v4", "rules v6", "sysctl", "qdiscs"} {
		if _, ok := before[kind]; !ok {
			t.Fatalf("the listing lacks %s", kind)
		}
	}

	must(t, a.WriteToken(ctx))
	must(t, a.StartAgent(ctx))
	must(t, a.WaitConnected(ctx))
	must(t, peer.WaitConnected(ctx))
	traffic(ctx, t, c, a, peer)
	during := list(ctx, t, a)
	left := 0
	for _, d := range differences(before, during) {
		if own(d, a) {
			left++
			continue
		}
		t.Errorf("while it runs, this is not Signet's own: %s", d)
	}
	if left < 10 {
		t.Errorf("only %d lines are Signet's own while it runs: the listing does not see it", left)
	}

	_, err = a.Signet(ctx, "down", "--release")
	must(t, err)
	must(t, a.StopAgent())
	after := list(ctx, t, a)
	lines := 0
	for _, part := range after {
		lines += len(part)
	}
	diff := differences(before, after)
	for _, d := range diff {
		t.Errorf("after it has gone: %s", d)
	}
	t.Logf("%d lines of %d kinds: %d were Signet's own while it ran, %d differ after down --release", lines, len(after), left, len(diff))
	for _, kind := range slices.Sorted(maps.Keys(after)) {
		t.Logf("  %-28s %4d lines before, %4d while it ran, %4d after", kind, len(before[kind]), len(during[kind]), len(after[kind]))
	}
}

// furnish gives the host things of its own, so that there is something to lose.
func furnish(ctx context.Context, t *testing.T, a *scenario.Agent) {
	t.Helper()
	for _, line := range []string{
		"nft add table inet own",
		"nft add chain inet own input { type filter hook input priority 0 ; policy accept ; }",
		"nft add rule inet own input tcp dport 23 drop",
		"ip route add 203.0.113.0/24 dev " + a.If + " metric 77",
		"ip route add default dev " + a.If + " metric 1000",
		"ip -6 route add 2001:db8:77::/48 dev " + a.If,
		"ip rule add fwmark 7 lookup 77 priority 7777",
		"ip tuntap add dev own0 mode tun", "ip link set own0 up", "ip address add 192.0.2.201/32 dev own0",
		"tc qdisc add dev " + a.If + " clsact",
		"sysctl -qw net.ipv4.conf.all.rp_filter=2 net.ipv4.ip_forward=1",
	} {
		args := strings.Fields(line)
		out, err := a.Host.Command(ctx, netlab.Opts{}, args[0], args[1:]...).Output()
		if err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	// Not every machine has the program, nor every kernel what it needs.
	for _, tool := range []string{"iptables", "iptables-legacy", "ip6tables"} {
		out, err := a.Host.Command(ctx, netlab.Opts{}, tool, "-A", "INPUT", "-p", "tcp", "--dport", "23", "-j", "DROP").Output()
		t.Logf("a rule of the host's own by %s: %v %.100s", tool, err, out)
	}
}

// traffic makes flows pass in both families, so that what is made on first use is there.
func traffic(ctx context.Context, t *testing.T, c *scenario.Cluster, a, peer *scenario.Agent) {
	t.Helper()
	must(t, c.ApplyPolicy(ctx, pulsePolicy(time.Time{})))
	v4, v6, err := a.Address(ctx, "data/postgres")
	must(t, err)
	for i, addr := range []netip.Addr{v4, v6} {
		for _, network := range []string{"tcp", "udp"} {
			at := netip.AddrPortFrom(addr, uint16(firstPulse+i)).String()
			serve := c.Probe(ctx, a, scenario.Postgres, "serve", network, at)
			must(t, serve.Start())
			must(t, serve.WaitFor(ctx, "serving"))
			var out string
			for begin := time.Now(); time.Since(begin) < 20*time.Second; {
				if out, err = c.Probe(ctx, peer, scenario.APIServer, "dial", network, at).Output(); err == nil {
					break
				}
			}
			if err != nil {
				t.Fatalf("%s %s: %v: %s", network, at, err, out)
			}
			must(t, serve.Kill(unix.SIGKILL))
			<-serve.Done()
		}
	}
}

// volatile are sysctls that the kernel itself changes all the time.
var volatile = []string{"fs.dentry-state", "fs.inode-", "fs.file-nr", "fs.aio-nr", "fs.quota.", "fs.mqueue.", "kernel.random.", "kernel.ns_last_pid", "kernel.pty.nr",
	"kernel.tainted", "kernel.sched", "net.netfilter.nf_conntrack_count", "net.ipv4.tcp_mem", "net.ipv4.udp_mem", "fs.binfmt_misc."}

// list takes the listing. A program that the machine does not have leaves its part out, in all three listings alike.
func list(ctx context.Context, t *testing.T, a *scenario.Agent) listing {
	t.Helper()
	out := listing{}
	run := func(kind, name string, args ...string) {
		text, err := a.Host.Command(ctx, netlab.Opts{}, name, args...).Output()
		if err == nil {
			out[kind] = tidy(text)
		}
	}
	run("nft", "nft", "list", "ruleset")
	for _, tool := range []string{"iptables", "ip6tables", "iptables-legacy", "ip6tables-legacy"} {
		run(tool+"-save", tool+"-save")
	}
	for _, family := range []string{"4", "6"} {
		run("routes v"+family, "ip", "-"+family, "route", "show", "table", "all")
		run("rules v"+family, "ip", "-"+family, "rule", "show")
	}
	run("addresses", "ip", "-o", "address", "show")
	run("links", "ip", "-o", "-d", "link", "show")
	run("qdiscs", "tc", "qdisc", "show")
	run("sysctl", "sysctl", "-a")
	out["sysctl"] = slices.DeleteFunc(out["sysctl"], func(line string) bool {
		return slices.ContainsFunc(volatile, func(v string) bool { return strings.HasPrefix(line, v) })
	})
	for _, file := range []string{"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"} {
		run(filepath.Base(file), "cat", file)
	}
	var devices []net.Interface
	must(t, a.Host.Do(func() (err error) { devices, err = net.Interfaces(); return err }))
	for _, d := range devices {
		for _, where := range []string{"ingress", "egress"} {
			run("filters "+d.Name+" "+where, "tc", "filter", "show", "dev", d.Name, where)
		}
		must(t, a.Host.Do(func() error {
			for name, kind := range map[string]uint32{"xdp": attachXDP, "tcx ingress": attachTCXIngress, "tcx egress": attachTCXEgress} {
				out["bpf "+d.Name] = append(out["bpf "+d.Name], programs(name, uint32(d.Index), kind)...)
			}
			return nil
		}))
		slices.Sort(out["bpf "+d.Name])
	}
	cgroupPrograms(t, a, out)
	must(t, filepath.WalkDir(a.Host.BPFFS(), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() { // an empty folder is no pin
			out["pins"] = append(out["pins"], strings.TrimPrefix(path, a.Host.BPFFS()))
		}
		return err
	}))
	return out
}

// Attach types of programs (enum bpf_attach_type of the kernel's interface).
const (
	attachXDP        = 37
	attachTCXIngress = 46
	attachTCXEgress  = 47
	lastAttach       = 60
)

// cgroupPrograms lists what hangs on the host's cgroups themselves.
func cgroupPrograms(t *testing.T, a *scenario.Agent, out listing) {
	t.Helper()
	must(t, filepath.WalkDir(a.Host.CgroupRoot(), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for kind := range uint32(lastAttach) {
			if kind != attachXDP && kind != attachTCXIngress && kind != attachTCXEgress {
				out["bpf cgroups"] = append(out["bpf cgroups"], programs(fmt.Sprintf("%s type %d", strings.TrimPrefix(path, a.Host.CgroupRoot()), kind), uint32(fd), kind)...)
			}
		}
		return nil
	}))
}

// programs asks the kernel (BPF_PROG_QUERY) which programs are attached to a device or cgroup, one line for each. A kind
// that does not fit the target has none.
func programs(name string, target, kind uint32) []string {
	const progQuery, most = 16, 64
	var ids [most]uint32
	attr := make([]byte, 64)
	binary.NativeEndian.PutUint32(attr[0:], target)
	binary.NativeEndian.PutUint32(attr[4:], kind)
	binary.NativeEndian.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&ids[0]))))
	binary.NativeEndian.PutUint32(attr[24:], most)
	_, _, errno := unix.Syscall(unix.SYS_BPF, progQuery, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	if errno != 0 {
		return nil
	}
	var out []string
	for i := range binary.NativeEndian.Uint32(attr[24:]) {
		out = append(out, fmt.Sprintf("%s: program %d", name, ids[i]))
	}
	return out
}

// tidy sorts the lines and takes out what changes by itself: counters and lifetimes.
func tidy(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "# Generated by") || strings.HasPrefix(line, "# Completed on") || strings.HasPrefix(line, "# Warning: iptables") {
			continue
		}
		fields := strings.Fields(line)
		for i := range fields {
			if strings.HasPrefix(fields[i], "[") && strings.Contains(fields[i], ":") && strings.HasSuffix(fields[i], "]") {
				fields[i] = "[counters]"
			}
		}
		out = append(out, strings.Join(fields, " "))
	}
	slices.Sort(out)
	return out
}

// difference is one line that is in one of two listings only.
type difference struct{ kind, sign, line string }

func (d difference) String() string { return fmt.Sprintf("%s: %s %s", d.kind, d.sign, d.line) }

func differences(before, after listing) (out []difference) {
	kinds := maps.Clone(before)
	maps.Copy(kinds, after)
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		counts := map[string]int{}
		for _, line := range before[kind] {
			counts[line]--
		}
		for _, line := range after[kind] {
			counts[line]++
		}
		for _, line := range slices.Sorted(maps.Keys(counts)) {
			for n := counts[line]; n != 0; {
				if n > 0 {
					out, n = append(out, difference{kind, "+", line}), n-1
				} else {
					out, n = append(out, difference{kind, "-", line}), n+1
				}
			}
		}
	}
	return out
}

// own reports whether a difference is one of the things that the documentation says are Signet's: its device with
// addresses, routes and settings, the unreachable routes of the overlay, and its programs on devices and cgroups.
func own(d difference, a *scenario.Agent) bool {
	if d.sign != "+" {
		return false
	}
	switch {
	case d.kind == "pins", d.kind == "bpf cgroups":
		return true
	case strings.HasPrefix(d.kind, "bpf "):
		return strings.Contains(d.line, "tcx") // the underlay guard
	case strings.HasSuffix(d.kind, " "+device+" ingress"), strings.HasSuffix(d.kind, " "+device+" egress"):
		return true
	case d.kind == "sysctl":
		return strings.Contains(d.line, "."+device+".")
	case strings.HasPrefix(d.kind, "routes"):
		return strings.Contains(d.line, "dev "+device) || strings.HasPrefix(d.line, "unreachable ") && overlayRoute(d.line)
	case d.kind == "addresses", d.kind == "links", d.kind == "qdiscs":
		return bytes.Contains([]byte(d.line), []byte(device))
	}
	return false
}

func overlayRoute(line string) bool {
	p, err := netip.ParsePrefix(strings.Fields(line)[1])
	return err == nil && overlay(p.Addr())
}
