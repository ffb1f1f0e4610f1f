package revoke

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// The lab's identities and addresses: two workloads of this host, and a remote one that never answers. The overlay is a
// corner of the benchmarking range.
const (
	numA      identity.Number = 300
	numB      identity.Number = 301
	numRemote identity.Number = 900
)

var (
	overlay4 = netip.MustParsePrefix("198.18.0.0/15")
	overlay6 = netip.MustParsePrefix("fd5a:7::/48")
	a4, a6   = netip.MustParseAddr("198.18.0.5"), netip.MustParseAddr("fd5a:7::5")
	b4, b6   = netip.MustParseAddr("198.18.0.6"), netip.MustParseAddr("fd5a:7::6")
	remote4  = netip.MustParseAddr("198.18.1.9")
	remote6  = netip.MustParseAddr("fd5a:7::1:9")
)

// kinds are the mechanisms; every story is told of both.
var kinds = []Kind{KindIterator, KindDiag}

// lab is one host in a network namespace of its own, with the real judge in its kernel. The test's goroutine stays on the
// namespace's thread.
type lab struct {
	t       testing.TB
	cfg     enforce.Config
	judge   *enforce.Enforcer
	tunnel  int
	cgroups map[string]string
}

// newLab builds the host without a judge. Everything goes away with the test.
func newLab(t testing.TB) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to load programs and to make namespaces and cgroups")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	must(t, unix.Unshare(unix.CLONE_NEWNET), "new network namespace")
	l := &lab{t: t, cgroups: map[string]string{}}
	l.makeDevices()
	l.makeCgroups()
	pins := filepath.Join(t.TempDir(), "bpf")
	must(t, os.Mkdir(pins, 0o700), "make pins")
	must(t, unix.Mount("bpf", pins, "bpf", 0, ""), "mount bpffs")
	t.Cleanup(func() { must(t, unix.Unmount(pins, unix.MNT_DETACH), "unmount bpffs") })
	l.cfg = enforce.Config{BPFFS: filepath.Join(pins, "host"), CgroupRoot: l.cgroups["."], Tunnel: l.tunnel,
		Overlay4: overlay4, Overlay6: overlay6, SweepEvery: -1}
	return l
}

func must(t testing.TB, err error, what string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// makeDevices makes a tunnel that swallows everything; its other end is never read.
func (l *lab) makeDevices() {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	must(l.t, err, "open /dev/net/tun")
	l.t.Cleanup(func() { unix.Close(fd) })
	req, err := unix.NewIfreq("sig0")
	must(l.t, err, "name the tunnel")
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	must(l.t, unix.IoctlIfreq(fd, unix.TUNSETIFF, req), "make the tunnel")
	for _, cmd := range []string{
		"link set lo up", "link set sig0 up",
		"addr add 198.18.0.5/32 dev sig0", "addr add 198.18.0.6/32 dev sig0",
		"addr add fd5a:7::5/128 dev sig0 nodad", "addr add fd5a:7::6/128 dev sig0 nodad",
		"route replace 198.18.0.0/15 dev sig0", "route replace fd5a:7::/48 dev sig0",
	} {
		out, err := exec.Command("ip", strings.Fields(cmd)...).CombinedOutput()
		must(l.t, err, "ip "+cmd+": "+string(out))
	}
	i, err := net.InterfaceByName("sig0")
	must(l.t, err, "find the tunnel")
	l.tunnel = i.Index
}

func (l *lab) makeCgroups() {
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(l.t, err, "read mounts")
	var mount string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			mount = f[1]
		}
	}
	root, err := os.MkdirTemp(mount, "signet-revoke-")
	must(l.t, err, "make cgroup below the cgroup v2 mount "+mount)
	for _, name := range []string{".", "a", "b"} {
		l.cgroups[name] = filepath.Join(root, name)
		if name != "." {
			must(l.t, os.Mkdir(l.cgroups[name], 0o755), "make cgroup")
		}
	}
	l.t.Cleanup(func() {
		for _, name := range []string{"a", "b", "."} {
			var err error
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); runtime.Gosched() {
				// Processes that were killed leave their cgroup a moment later.
				if err = unix.Rmdir(l.cgroups[name]); !errors.Is(err, unix.EBUSY) {
					break
				}
			}
			if err != nil {
				l.t.Logf("remove cgroup %s: %v", name, err)
			}
		}
	})
}

// enforce loads and attaches the judge.
func (l *lab) enforce() {
	l.t.Helper()
	e, err := enforce.Open(l.cfg)
	must(l.t, err, "open the judge")
	l.t.Cleanup(func() { must(l.t, e.Close(), "close the judge") })
	l.judge = e
}

// revoker opens one mechanism, and fails when it is not to be had.
func (l *lab) revoker(k Kind) *Revoker {
	l.t.Helper()
	r, err := Open(Config{
		Maps: filepath.Join(l.cfg.BPFFS, enforce.ABI, "maps"), Overlay4: overlay4, Overlay6: overlay6, Only: k,
		Judge: func(s Socket) bool { return Allowed(l.judge.View(), s, time.Now()) },
	})
	must(l.t, err, "open revoker")
	l.t.Cleanup(func() { must(l.t, r.Close(), "close revoker") })
	if r.Kind() != k {
		l.t.Fatalf("revoker is of kind %s: %s", r.Kind(), r.Why())
	}
	return r
}

// view knows A, B and the remote workload. Nothing is allowed yet.
func (l *lab) view() *policy.View {
	l.t.Helper()
	v := &policy.View{
		Overlay4: overlay4, Overlay6: overlay6, Revision: 7,
		Lease: policy.Lease{Ends: time.Now().Add(time.Hour)},
		Addresses: map[netip.Addr]policy.Address{
			a4: {Number: numA, Local: true}, a6: {Number: numA, Local: true},
			b4: {Number: numB, Local: true}, b6: {Number: numB, Local: true},
			remote4: {Number: numRemote}, remote6: {Number: numRemote},
		},
		Locals:   map[policy.LocalKey]identity.Number{},
		Rulesets: map[identity.Number]policy.Ruleset{numA: {}, numB: {}},
	}
	for name, n := range map[string]identity.Number{"a": numA, "b": numB} {
		id, err := enforce.CgroupID(l.cgroups[name])
		must(l.t, err, "id of cgroup")
		v.Locals[policy.LocalKey{Cgroup: id, UID: policy.AnyUID}] = n
	}
	return v
}

// permit allows a service in the rulesets of the ends that are here.
func permit(v *policy.View, rule uint32, from, to identity.Number, proto flow.Proto, port uint16) {
	slot(v, policy.Slot{Rule: rule}, from, to, proto, port)
}

func slot(v *policy.View, s policy.Slot, from, to identity.Number, proto flow.Proto, port uint16) {
	val := policy.Value{Allow: s}
	if rs := v.Rulesets[from]; rs != nil {
		rs[policy.Key{Peer: to, Port: port, Proto: proto, Dir: policy.Egress}] = val
	}
	if rs := v.Rulesets[to]; rs != nil {
		rs[policy.Key{Peer: from, Port: port, Proto: proto, Dir: policy.Ingress}] = val
	}
}

func (l *lab) apply(v *policy.View) {
	l.t.Helper()
	must(l.t, l.judge.Apply(context.Background(), v), "apply")
}

// sweep sweeps, and wants so many sockets to go.
func (l *lab) sweep(r *Revoker, want int) {
	l.t.Helper()
	got, err := r.Sweep(context.Background())
	must(l.t, err, "sweep")
	if got != want {
		l.t.Errorf("sweep ended %d sockets, want %d", got, want)
	}
}

// proc is a process in one of the cgroups (helper_test.go).
type proc struct {
	t   testing.TB
	in  *os.File
	out *bufio.Reader
}

// start runs a process in a cgroup and in the lab's namespace. It ends with the test.
func (l *lab) start(cgroup string) *proc {
	l.t.Helper()
	dir, err := os.Open(l.cgroups[cgroup])
	must(l.t, err, "open cgroup")
	defer dir.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	must(l.t, err, "pipe")
	out, err := cmd.StdoutPipe()
	must(l.t, err, "pipe")
	must(l.t, cmd.Start(), "start helper")
	l.t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // its status says nothing: what it did, it has told
	})
	return &proc{t: l.t, in: in.(*os.File), out: bufio.NewReader(out)}
}

// want gives one command and compares the answer with those that will do.
func (p *proc) want(answers, format string, args ...any) {
	p.t.Helper()
	cmd := fmt.Sprintf(format, args...)
	if _, err := fmt.Fprintln(p.in, cmd); err != nil {
		p.t.Fatalf("%s: %v", cmd, err)
	}
	got, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("%s: helper ended: %v", cmd, err)
	}
	got = strings.TrimSpace(got)
	for a := range strings.SplitSeq(answers, "|") {
		if got == a {
			return
		}
	}
	p.t.Errorf("%s: got %q, want %s", cmd, got, answers)
}

// ended: the application learns within 100 ms.
func (p *proc) ended(sockets ...string) {
	p.t.Helper()
	for _, s := range sockets {
		p.want("ECONNABORTED|ECONNRESET", "fate %s 100", s)
	}
}

// alive: nothing happened to the sockets.
func (p *proc) alive(sockets ...string) {
	p.t.Helper()
	for _, s := range sockets {
		p.want("alive", "fate %s 0", s)
	}
}

// talk proves that a pair still works, both ways.
func talk(a *proc, from string, b *proc, to string) {
	a.t.Helper()
	a.want("ok", "send %s ping", from)
	b.want("ping", "recv %s", to)
	b.want("ok", "send %s pong", to)
	a.want("pong", "recv %s", from)
}

// pair connects A to B and proves it. For UDP both ends are connected sockets.
func pair(a *proc, client string, b *proc, server, listener, kind, target string) {
	a.t.Helper()
	b.want("ok", "listen l%s %s %s", server, listener, target)
	a.want("ok", "connect %s %s %s", client, kind, target)
	if strings.HasPrefix(kind, "udp") {
		a.want("ok", "send %s first", client)
		b.want("first", "recv l%s", server)
		b.want("ok", "answer l%s", server)
		return
	}
	b.want("ok", "accept %s l%s", server, server)
	talk(a, client, b, server)
}
