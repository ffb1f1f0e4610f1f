package containers

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
)

// TestContainers goes through the life of two containers. The parts build upon one another: starting hosts is slow.
func TestContainers(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	l := newLab(ctx, t)
	part := func(name string, f func()) {
		t.Run(name, func(t *testing.T) {
			outer := l.t
			l.t = t
			defer func() { l.t = outer }()
			f()
		})
	}
	part("matching", l.checkMatching)
	part("forwarding", l.checkForwarding)
	part("routes", l.checkRoutes)
	part("flows", l.checkFlows)
	part("spoofing", l.checkSpoofing)
	part("devices", l.checkDevices)
}

// checkMatching: a container is its workload while its runtime says so, and a device while it is there.
func (l *lab) checkMatching() {
	if w := l.workload("web"); w.Matched || !strings.Contains(w.Why, "no running container") {
		l.t.Fatalf("before it runs, web is %+v", w)
	}
	l.web.configure(l.webAt)
	l.cache.configure(l.cacheAt)
	main := l.web.probe(context.WithoutCancel(l.ctx), "serve", "tcp", "[::]:8080")
	serve(l, main)
	// Its cgroup is there and its runtime has said nothing yet.
	l.await("web", patient, func(w workload) bool { return !w.Matched && strings.Contains(w.Why, "nothing is known") })
	l.web.docker(main.PID(), map[string]string{"com.example.app": "web", "com.example.note": "\"},\x1b[31m\n{"})
	took := l.await("web", prompt, matched)
	l.t.Logf("web matched after %v", took)
	if w := l.workload("web"); len(w.Cgroups) != 1 || w.Cgroups[0] != "/"+l.web.cgroup {
		l.t.Errorf("web has cgroups %v", w.Cgroups)
	}
	l.await("cache", prompt, matched)
	serve(l, l.cache.probe(context.WithoutCancel(l.ctx), "serve", "tcp", "[::]:8080"))
	serve(l, l.Probe(context.WithoutCancel(l.ctx), l.App, worker, "serve", "tcp", "[::]:8080"))
}

// checkForwarding: the agent names what is off and changes nothing.
func (l *lab) checkForwarding() {
	names := map[string]string{"net.ipv4.ip_forward": "ipv4/ip_forward", "net.ipv6.conf.all.forwarding": "ipv6/conf/all/forwarding"}
	set := func(value string) {
		must(l.t, l.App.Host.Do(func() error {
			for _, path := range names {
				if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	warned := func() (list []string) {
		s, err := l.App.Status(l.ctx)
		must(l.t, err)
		for name := range names {
			for _, w := range s.Warnings {
				if strings.Contains(w, name+" is 0") && strings.Contains(w, "sysctl -w "+name+"=1") {
					list = append(list, name)
				}
			}
		}
		return list
	}
	set("0")
	if got := warned(); len(got) != 2 {
		l.t.Errorf("with forwarding off it warns of %v", got)
	}
	set("1")
	if got := warned(); len(got) != 0 {
		l.t.Errorf("with forwarding on it warns of %v", got)
	}
}

// checkRoutes: a container's addresses are behind its device, and not on the tunnel's.
func (l *lab) checkRoutes() {
	have := l.web.host("ip -o addr show dev signet0")
	for at, veth := range map[pair]string{l.webAt: l.web.veth, l.cacheAt: l.cache.veth} {
		for _, a := range at.all() {
			if strings.Contains(have, a.String()+"/") {
				l.t.Errorf("the tunnel device has %v", a)
			}
			if out := l.web.host("ip route get %v", a); !strings.Contains(out, "dev "+veth) {
				l.t.Errorf("%v goes to %s", a, out)
			}
		}
	}
	for _, a := range l.workAt.all() {
		if !strings.Contains(have, a.String()+"/") {
			l.t.Errorf("the tunnel device lacks %v of a workload without a namespace:\n%s", a, have)
		}
	}
}

// checkFlows: what a rule allows passes, in both families, and all else is refused.
func (l *lab) checkFlows() {
	pg := func(addr netip.Addr) []string {
		return []string{"psql", "-h", addr.String(), "-U", "postgres", "-Atc", "select 6*7"}
	}
	dial := func(addr netip.Addr) []string {
		return []string{l.Bin("probe"), "dial", "tcp", netip.AddrPortFrom(addr, 8080).String()}
	}
	box := func(b *box) func(...string) *netlab.Cmd {
		return func(args ...string) *netlab.Cmd { return b.exec(l.ctx, args[0], args[1:]...) }
	}
	host := func(args ...string) *netlab.Cmd {
		return l.App.Host.Command(l.ctx, netlab.Opts{Cgroup: worker}, args[0], args[1:]...)
	}
	remote := func(args ...string) *netlab.Cmd {
		return l.Data.Host.Command(l.ctx, netlab.Opts{Cgroup: "system.slice/postgresql.service"}, args[0], args[1:]...)
	}
	for _, c := range []struct {
		name  string
		from  func(...string) *netlab.Cmd
		do    func(netip.Addr) []string
		to    pair
		allow string // output of what is allowed; empty where it is refused
	}{
		{"container to remote database", box(l.web), pg, l.pgAt, "42"},
		{"container without a rule to remote database", box(l.cache), pg, l.pgAt, ""},
		{"remote to container", remote, dial, l.webAt, "ok after"},
		{"remote to namespace", remote, dial, l.cacheAt, "ok after"},
		{"host's workload to container", host, dial, l.webAt, "ok after"},
		{"host's workload without a rule to namespace", host, dial, l.cacheAt, ""},
		{"container to host's workload", box(l.web), dial, l.workAt, "ok after"},
		{"namespace to host's workload", box(l.cache), dial, l.workAt, "ok after"},
		{"container to container", box(l.web), dial, l.cacheAt, "ok after"},
		{"container to container against the rule", box(l.cache), dial, l.webAt, ""},
		{"container of nobody to container", box(l.nobody), dial, l.webAt, ""},
	} {
		for _, addr := range c.to.all() {
			out, err := c.from(c.do(addr)...).Output()
			switch {
			case c.allow != "" && (err != nil || !strings.Contains(out, c.allow)):
				l.t.Errorf("%s at %v: %v: %s", c.name, addr, err, out)
			case c.allow == "" && err == nil:
				l.t.Errorf("%s at %v passed: %s", c.name, addr, out)
			}
		}
	}
}

// checkSpoofing: another's address is refused where it enters the host, and so is every overlay address that comes from a
// device of nobody. The senders' own cgroups are not judged here: they are those of the namespaces' own hosts.
func (l *lab) checkSpoofing() {
	for _, c := range []struct {
		name   string
		from   *box
		at     pair
		reason string
	}{
		{"a container with another's address", l.cache, l.webAt, "SPOOFED_SOURCE"},
		{"a container of nobody with a workload's address", l.nobody, l.webAt, "NOT_TUNNEL"},
	} {
		if c.from == l.nobody {
			c.from.configure(c.at)
		} else {
			c.from.inside("ip addr add %s/32 dev ovl0", c.at.v4)
			c.from.inside("ip addr add %s/128 dev ovl0 nodad", c.at.v6)
		}
		for i, src := range c.at.all() {
			dst := l.pgAt.all()[i]
			c.from.inside("ip route replace %s via %s dev ovl0 src %s", dst, []string{"169.254.1.1", "fe80::1"}[i], src)
			before := l.denied(c.reason)
			out, err := c.from.space.Command(l.ctx, netlab.Opts{}, l.Bin("probe"), "dial", "tcp", netip.AddrPortFrom(dst, 5432).String()).Output()
			if err == nil {
				l.t.Errorf("%s, %v: passed: %s", c.name, src, out)
			}
			if after := l.denied(c.reason); after <= before {
				l.t.Errorf("%s, %v: %s was counted %d times before and %d after", c.name, src, c.reason, before, after)
			}
		}
	}
	// The one whose address it is was not disturbed.
	if out, err := l.web.exec(l.ctx, "psql", "-h", l.pgAt.v4.String(), "-U", "postgres", "-Atc", "select 1").Output(); err != nil {
		l.t.Errorf("the rightful container: %v: %s", err, out)
	}
}

// checkDevices: devices that come and go are seen, and so is one that could be anybody.
func (l *lab) checkDevices() {
	l.cache.host("ip link del %s", l.cache.veth)
	took := l.await("cache", prompt, func(w workload) bool { return !w.Matched && strings.Contains(w.Why, "device missing") })
	l.t.Logf("the loss of a device was seen after %v", took)
	if out := l.cache.host("ip route show %v", l.cacheAt.v4); out != "" {
		l.t.Errorf("a device that is gone has the route %s", out)
	}
	l.cache.plug()
	l.cache.configure(l.cacheAt)
	took = l.await("cache", prompt, matched)
	l.t.Logf("a new device was seen after %v", took)
	dialled := func() error {
		_, err := l.Data.Host.Command(l.ctx, netlab.Opts{Cgroup: "system.slice/postgresql.service"}, l.Bin("probe"), "dial", "tcp", fmt.Sprintf("%v:8080", l.cacheAt.v4)).Output()
		return err
	}
	if err := dialled(); err != nil {
		l.t.Errorf("through the new device: %v\n%s%s%s%s", err, l.cache.host("ip -4 route show"), l.cache.host("ip neigh show dev %s", l.cache.veth),
			l.cache.inside("ip -4 route show"), l.Evidence(l.ctx))
	}
	l.cache.host("ip link set %s down", l.cache.veth)
	l.cache.host("ip link set %s netns %s", l.cache.veth, "containers-box-nobody")
	l.await("cache", prompt, func(w workload) bool { return !w.Matched })
	// One whose other end is on this host.
	l.cache.host("ip link add vcache type veth peer name vfar")
	l.await("cache", prompt, func(w workload) bool { return !w.Matched && strings.Contains(w.Why, "other end is in this one") })
}
