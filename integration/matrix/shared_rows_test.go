package matrix

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/probe/forge"
	"github.com/signet-overlay/signet/integration/scenario"
)

// sharedRows use a socket of one cgroup from a process of another.
func (l *lab) sharedRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		for _, proto := range []string{"udp", "tcp"} {
			step := "send EPERM"
			if proto == "tcp" {
				step = "connect EINPROGRESS" // the SYN is dropped, which the caller does not learn
			}
			s := attack.Spec{Kind: attack.Socket, Proto: proto, V6: ln.six, Tricks: []string{attack.Connect}, Dst: ln.dst}
			for _, by := range []attacker{root, workload} {
				add := func(name, hook, step, reason string, do func(t *testing.T, r *row) string) {
					r := ln.row(name+" ("+proto+")", by, hook, reason)
					r.step, r.do = step, do
					out = append(out, r)
				}
				owner := netlab.Opts{Cgroup: ln.owner}
				callers := by.reason
				if by.name == workload.name {
					callers = "NO_RULE" // the caller would be itself
				}
				add("socket of the attacker, passed to the owner", "egress", step, by.reason, func(t *testing.T, r *row) string { return l.passed(t, r, s, by.as, owner) })
				add("socket of the owner, passed to the attacker", "connect", "connect EACCES", callers, func(t *testing.T, r *row) string { return l.passed(t, r, s, owner, by.as) })
				add("process moved to the owner's cgroup", "egress", step, by.reason, func(t *testing.T, r *row) string { return l.moved(t, r, s, by.as, ln.owner) })
				add("process moved from the owner's cgroup", "connect", "connect EACCES", callers, func(t *testing.T, r *row) string { return l.moved(t, r, s, owner, by.as.Cgroup) })
			}
		}
	}
	return out
}

// passed opens a socket as one and uses it as another (SCM_RIGHTS).
func (l *lab) passed(t *testing.T, r *row, s attack.Spec, maker, user netlab.Opts) string {
	t.Helper()
	path := filepath.Join(l.Dir(), strings.Trim(r.token, "-")+".sock")
	giver, taker := s, s
	giver.Give, taker.Take, taker.Payload = path, path, r.token
	cmd := l.prepareAttack(t, r.at, maker, giver)
	must(t, cmd.Start())
	must(t, cmd.WaitFor(l.ctx, "opened"))
	said := l.attack(t, r.at, user, taker)
	must(t, cmd.Wait())
	return said
}

// moved opens a socket in one cgroup and uses it after the process was moved to another.
func (l *lab) moved(t *testing.T, r *row, s attack.Spec, from netlab.Opts, to string) string {
	t.Helper()
	s.Hold, s.Payload = true, r.token
	in, word := io.Pipe()
	from.Stdin = in
	cmd := l.prepareAttack(t, r.at, from, s)
	must(t, cmd.Start())
	must(t, cmd.WaitFor(l.ctx, "opened"))
	dir, err := r.at.Host.Cgroup(to)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(cmd.PID())), 0))
	_, err = fmt.Fprintln(word, "go")
	must(t, err)
	word.Close()
	must(t, cmd.Wait())
	return cmd.Text()
}

// listenerRows take what is meant for a workload by listening on every address: the legitimate client must not reach the
// attacker.
func (l *lab) listenerRows() []*row {
	var out []*row
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		other := batch
		host := l.App
		if ln.path == "tunnel" {
			other, host = backup, l.Data
		}
		ln.judge = host
		for _, proto := range []string{"tcp", "udp"} {
			for _, by := range []attacker{{"root", netlab.Opts{Cgroup: scenario.Stranger}, "NO_IDENTITY", true}, {"nobody", netlab.Opts{Cgroup: scenario.Stranger, UID: uidBody}, "NO_IDENTITY", false},
				{"workload", netlab.Opts{Cgroup: other}, "WRONG_RECEIVER", true}} {
				wild := "0.0.0.0"
				if ln.family != "v4" {
					wild = "[::]"
				}
				r := ln.row("wildcard listener on a workload's address ("+proto+")", by, "ingress", by.reason)
				r.dst = netip.AddrPortFrom(ln.dst.Addr(), portTaken)
				r.src, r.legitimate = at(ln.src), true
				r.do = func(t *testing.T, r *row) string {
					return l.overheard(t, r, ln, host, by.as, proto, fmt.Sprintf("%s:%d", wild, portTaken))
				}
				out = append(out, r)
				if proto == "udp" && by.as.UID == 0 { // a port is shared only between processes of one user
					shared := *r
					shared.attack = "SO_REUSEPORT listener beside the workload's"
					shared.dst = netip.AddrPortFrom(ln.dst.Addr(), portShared)
					shared.do = func(t *testing.T, r *row) string { return l.shared(t, r, ln, host, by.as.Cgroup) }
					out = append(out, &shared)
				}
			}
		}
	}
	return out
}

// overheard lets an attacker listen and the owner of the lane call. It returns what both said, and fails when the
// attacker got anything.
func (l *lab) overheard(t *testing.T, r *row, ln lane, host *scenario.Agent, as netlab.Opts, proto, where string) string {
	t.Helper()
	as.GID = as.UID
	server := host.Host.Command(l.ctx, as, l.Bin("probe"), "serve", proto, where)
	must(t, server.Start())
	must(t, server.WaitFor(l.ctx, "serving"))
	said := l.attack(t, ln.at, netlab.Opts{Cgroup: ln.owner}, attack.Spec{Kind: attack.Socket, Proto: proto, V6: ln.six,
		Tricks: []string{attack.Connect}, Dst: netip.AddrPortFrom(ln.dst.Addr(), portTaken), Payload: r.token})
	refused := func() bool { r.cells = l.tallies[r.judge.Host.Name()].since(t, r.before); return r.counted() }
	if got := func() bool { return len(strings.SplitAfter(server.Text(), "\n")) > 2 }; !until(patient, func() bool { return refused() || got() }) {
		t.Errorf("%s: nothing came of it: %s", r.name(), said)
	}
	must(t, server.Kill(unix.SIGKILL))
	<-server.Done()
	if got := server.Text(); strings.Contains(got, "accepted") || strings.Contains(got, "got") {
		t.Errorf("%s: LET THROUGH: the listener got it: %s", r.name(), got)
	}
	return said
}

// cageRows come from a process that is root of a namespace of its own, by a veth that the host gave it.
func (l *lab) cageRows() []*row {
	var out []*row
	c := &cage{l: l, device: "cage0", net4: "203.0.113.", net6: "2001:db8:99::", guarded: true}
	strange := map[string]netip.Addr{"v4": netip.MustParseAddr("203.0.113.2"), "v6": netip.MustParseAddr("2001:db8:99::2")}
	for i, ln := range l.lanes("v4", "v6") {
		ln.device = "eth0"
		for name, src := range map[string]netip.Addr{"a workload's address": ln.src, "its own address": strange[ln.family]} {
			// A namespace of its own is none of the hooks' at sockets: what counts is where its packets reach this one.
			for _, kind := range []string{attack.Raw, attack.Packet} {
				r := ln.rawRow("from a container, "+name+", "+kind+" socket", attacker{name: "caged"}, kind, "guard", func(ln lane, _ netip.AddrPort, token string) [][]byte {
					return forgedUDP(ln, netip.AddrPortFrom(src, rawPort), token)
				}, "NOT_TUNNEL")
				r.src, r.control, r.step = at(src), nil, ""
				mk := r.make
				r.do = func(t *testing.T, r *row) string { return c.run(t, mk(r.token)) }
				out = append(out, r)
			}
		}
		// By the tuple of a live flow, and before the agent has seen the device: what is forwarded has no socket either, but
		// it is no reply of the kernel.
		r := ln.rawRow("from a container, a live flow's tuple, device not guarded yet", attacker{name: "caged"}, attack.Packet, ln.below, forgedUDP, "NO_IDENTITY", "SPOOFED_SOURCE")
		early := &cage{l: l, device: fmt.Sprint("cage", i+1), net4: fmt.Sprintf("10.51.%d.", i), net6: fmt.Sprintf("2001:db8:5%d::", i)}
		if ln.path == "lo" {
			r.hook, r.reasons = "ingress", []string{"NOT_TUNNEL"}
		}
		r.control = nil
		mk := r.make
		r.do = func(t *testing.T, r *row) string { return early.runEarly(t, mk(r.token)) }
		out = append(out, r)
	}
	return out
}

// cage is the process with its namespace; it is made when the first row needs it.
type cage struct {
	l          *lab
	device     string // the host's end of the cage's device
	net4, net6 string // what addresses there begin with; documentation ranges
	guarded    bool   // wait until the agent guards the device
	in         *hand
	mac        []byte
}

func (c *cage) open(t *testing.T) {
	t.Helper()
	in, lines := io.Pipe()
	inside := attack.Spec{Kind: attack.Cage, Setup: [][]string{
		{"ip", "link", "set", "lo", "up"}, {"ip", "link", "set", "eth0", "up"},
		{"ip", "address", "add", c.net4 + "2/24", "dev", "eth0"}, {"ip", "address", "add", c.net6 + "2/64", "dev", "eth0", "nodad"},
		{"ip", "route", "add", "default", "via", c.net4 + "1"}, {"ip", "-6", "route", "add", "default", "via", c.net6 + "1"},
		// The neighbour is found before it matters: what waits for it would come after the row is over.
		{"ping", "-q", "-c", "1", "-w", "3", c.net4 + "1"}, {"ping", "-q", "-c", "1", "-w", "3", c.net6 + "1"},
	}}
	c.in = &hand{cmd: c.l.prepareAttack(t, c.l.App, netlab.Opts{Cgroup: scenario.Stranger, UID: uidBody, Stdin: in}, inside), lines: lines}
	c.l.hands[c.device] = c.in
	must(t, c.in.cmd.Start())
	ctx, cancel := context.WithTimeout(c.l.ctx, patient)
	defer cancel()
	must(t, c.in.cmd.WaitFor(ctx, "opened"))
	must(t, c.in.cmd.WaitFor(ctx, "pid "))
	var pid int
	for line := range strings.Lines(c.in.cmd.Text()) {
		_, _ = fmt.Sscanf(line, "pid %d", &pid)
	}
	h := c.l.App
	c.l.must(t, h, "ip", "link", "add", c.device, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(pid))
	c.l.must(t, h, "ip", "address", "add", c.net4+"1/24", "dev", c.device)
	c.l.must(t, h, "ip", "address", "add", c.net6+"1/64", "dev", c.device, "nodad")
	c.l.must(t, h, "sysctl", "-qw", "net.ipv4.conf."+c.device+".rp_filter=0", "net.ipv4.conf."+c.device+".accept_local=1")
	c.l.must(t, h, "ip", "link", "set", c.device, "up")
	var index int
	must(t, h.Host.Do(func() error {
		i, err := net.InterfaceByName(c.device)
		if err == nil {
			index, c.mac = i.Index, i.HardwareAddr
		}
		return err
	}))
	// A new device is guarded within a second; what comes before that is refused further in.
	pin := filepath.Join(h.Host.BPFFS(), "signet", "*", "links", fmt.Sprintf("guard*%d*", index))
	if c.guarded && !until(patient, func() bool { found, _ := filepath.Glob(pin); return len(found) > 0 }) {
		t.Errorf("the device of a container is not guarded: no %s", pin)
	}
	_, err := fmt.Fprintln(lines, "go")
	must(t, err)
}

func (c *cage) run(t *testing.T, s attack.Spec) string {
	t.Helper()
	if c.in == nil {
		c.open(t)
	}
	s.MAC = c.mac
	return c.in.run(t, s)
}

// runEarly runs an attack while the agent stands still, as on a host that is busy.
func (c *cage) runEarly(t *testing.T, s attack.Spec) string {
	t.Helper()
	must(t, c.l.App.Proc.Kill(unix.SIGSTOP))
	defer func() { must(t, c.l.App.Proc.Kill(unix.SIGCONT)) }()
	return c.run(t, s)
}

// positives are what must work beside all that is refused.
func (l *lab) positives(t *testing.T) {
	for _, ln := range l.lanes("v4", "v6", "mapped") {
		network := map[string]string{"v4": "udp4", "v6": "udp6", "mapped": "udp4"}[ln.family]
		t.Run("a wildcard server answers from the address that was asked "+ln.path+" "+ln.family, func(t *testing.T) {
			// The dialer's socket is connected: an answer from another address would not reach it.
			if out, err := l.Probe(l.ctx, ln.at, ln.owner, "dial", network, ln.dst.String()).Output(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
		for _, proto := range []string{"tcp", "udp"} {
			t.Run("a dissolved connection keeps no overlay source "+proto+" "+ln.path+" "+ln.family, func(t *testing.T) { l.dissolved(t, ln, proto) })
		}
		if ln.path == "tunnel" {
			t.Run("replies of the kernel pass for a tracked flow "+ln.family, func(t *testing.T) { l.refusedByKernel(t, ln) })
		}
	}
	t.Run("what bypasses the queue works outside the judge's reach", l.bypassIsReal)
}

// dissolved connects to the overlay, takes it back and connects elsewhere with the same socket.
func (l *lab) dissolved(t *testing.T, ln lane, proto string) {
	to := netip.AddrPortFrom(l.under.v4, portRemote)
	if ln.family == "v6" {
		to = netip.AddrPortFrom(netip.IPv6Loopback(), portLocal)
	}
	out := l.attack(t, ln.at, netlab.Opts{Cgroup: ln.owner}, attack.Spec{Kind: attack.Socket, Proto: proto, V6: ln.six,
		Tricks: []string{attack.Dissolve, attack.Connect}, Before: ln.dst, Dst: to, Payload: attack.Token + "dissolved-", Wait: 3000})
	var sources []netip.AddrPort
	for line := range strings.Lines(out) {
		if a, ok := strings.CutPrefix(line, "local "); ok {
			ap, err := netip.ParseAddrPort(strings.TrimSpace(a))
			must(t, err)
			sources = append(sources, ap)
		}
	}
	if len(sources) != 2 || sources[0].Addr() != ln.src || l.overlay(sources[1].Addr()) || !strings.Contains(out, "step send ok") {
		t.Errorf("sources %v:\n%s", sources, out)
	}
}

// refusedByKernel calls a port where nobody listens: the reset, or the unreachable, comes back at once.
func (l *lab) refusedByKernel(t *testing.T, ln lane) {
	to := netip.AddrPortFrom(ln.dst.Addr(), portClosed)
	out := l.attack(t, ln.at, netlab.Opts{Cgroup: ln.owner}, attack.Spec{Kind: attack.Socket, Proto: "tcp", V6: ln.six, Tricks: []string{attack.Connect}, Dst: to, Wait: 3000})
	if !strings.Contains(out, "connect ECONNREFUSED") {
		t.Errorf("TCP: %s", out)
	}
	out, err := l.Probe(l.ctx, ln.at, ln.owner, "dial", "udp", to.String()).Output()
	if err == nil || !strings.Contains(out, "refused") {
		t.Errorf("UDP: %v: %s", err, out)
	}
}

// shared lets the attacker share the workload's port by SO_REUSEPORT: the kernel mixes them, and what it gives to the
// attacker is refused.
func (l *lab) shared(t *testing.T, r *row, ln lane, host *scenario.Agent, as string) string {
	t.Helper()
	wild := netip.AddrPortFrom(netip.IPv4Unspecified(), portShared)
	if ln.six {
		wild = netip.AddrPortFrom(netip.IPv6Unspecified(), portShared)
	}
	mine, theirs := l.sharer(t, host, ln.victim, wild), l.sharer(t, host, as, wild)
	const tries = 24
	for i := range tries {
		l.attack(t, ln.at, netlab.Opts{Cgroup: ln.owner}, attack.Spec{Kind: attack.Socket, Proto: "udp", V6: ln.six, Tricks: []string{attack.Connect},
			Dst: r.dst, Payload: fmt.Sprintf("%s%d-", r.token, i)})
	}
	at := cell{r.hook, r.reasons[0]}
	refused := func() int { return int(l.tallies[r.judge.Host.Name()].denied(t)[at] - r.before[at]) }
	got := func(c *netlab.Cmd) int { return strings.Count(c.Text(), "got "+r.token) }
	if !until(patient, func() bool { return got(mine)+refused() >= tries }) || got(mine) == 0 || refused() == 0 || got(theirs) != 0 {
		t.Errorf("%s: of %d datagrams the workload got %d, the attacker %d, and %d were refused", r.name(), tries, got(mine), got(theirs), refused())
	}
	for _, c := range []*netlab.Cmd{mine, theirs} {
		must(t, c.Kill(unix.SIGKILL))
		<-c.Done()
	}
	return ""
}

// sharer listens on a port together with others.
func (l *lab) sharer(t *testing.T, host *scenario.Agent, cgroup string, on netip.AddrPort) *netlab.Cmd {
	t.Helper()
	cmd := l.Probe(l.ctx, host, cgroup, "share", on.String())
	must(t, cmd.Start())
	must(t, cmd.WaitFor(l.ctx, "serving"))
	return cmd
}

// bypassIsReal runs, outside the judge's cgroup root, what the rows show to be refused inside: with the option the kernel
// has nothing against it.
func (l *lab) bypassIsReal(t *testing.T) {
	for _, s := range []attack.Spec{
		{Kind: attack.Packet, Device: tunnel, Tricks: []string{attack.Bypass}, Packets: [][]byte{forge.UDPPacket(netip.AddrPortFrom(l.api.v4, rawPort),
			netip.AddrPortFrom(l.pg.v4, portRemote), []byte(attack.Token+"bypass-"))}},
		{Kind: attack.XDP},
	} {
		var out bytes.Buffer
		err := l.App.Host.Do(func() error { return attack.Here(context.Background(), s, strings.NewReader(""), &out) })
		if err != nil || !strings.Contains(out.String(), "end") || strings.Contains(out.String(), "EPERM") {
			t.Errorf("%s: %v: %s", s.Kind, err, out.String())
		}
	}
	if !until(patient, func() bool { return strings.Contains(l.sees[scenario.Postgres].Text(), attack.Token+"bypass-") }) {
		t.Error("a packet past the queue did not arrive, so that the rows of PACKET_QDISC_BYPASS prove less")
	}
}
