package enforce

import (
	"bufio"
	"bytes"
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

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// The lab's identities and addresses. The overlay is a corner of the benchmarking range, so that nothing else on the
// machine can mean it.
const (
	numA      identity.Number = 300 // workload on this host
	numB      identity.Number = 301 // workload on this host
	numRemote identity.Number = 900
	numNode   identity.Number = 299
)

var (
	overlay4 = netip.MustParsePrefix("198.18.0.0/15")
	overlay6 = netip.MustParsePrefix("fd5a:7::/48")
	a4       = netip.MustParseAddr("198.18.0.5")
	a6       = netip.MustParseAddr("fd5a:7::5")
	b4       = netip.MustParseAddr("198.18.0.6")
	b6       = netip.MustParseAddr("fd5a:7::6")
	remote4  = netip.MustParseAddr("198.18.1.9")
	remote6  = netip.MustParseAddr("fd5a:7::1:9")
)

// lab is one host in a network namespace of its own, with a tunnel whose other end is the test, cgroups for workloads
// and an underlay link to a second namespace. The test's goroutine stays on the namespace's thread.
type lab struct {
	t       *testing.T
	cfg     Config
	tun     int // file descriptor: reading it shows what leaves by the tunnel
	tunnel  int // ifindex
	veth    int // ifindex of the underlay device
	cgroups map[string]string
	ids     map[string]uint64
	home    int    // namespace of the host, as a descriptor
	far     int    // namespace at the other end of the underlay
	takes   string // what filters of other tools do (clsact_test.go)
}

func needRoot(t *testing.T) {
	t.Helper()
	if !root() {
		t.Skip("needs root to load programs and to make namespaces and cgroups")
	}
}

func root() bool { return os.Geteuid() == 0 }

// newLab builds the host. Everything goes away with the test.
func newLab(t *testing.T) *lab {
	t.Helper()
	needRoot(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	l := &lab{t: t, cgroups: map[string]string{}, ids: map[string]uint64{}}
	must(t, unix.Unshare(unix.CLONE_NEWNET), "new network namespace")
	l.far = l.namespace()
	must(t, unix.Unshare(unix.CLONE_NEWNET), "new network namespace")
	l.home = l.namespace()
	l.makeCgroups()
	l.makeDevices()
	pins := filepath.Join(t.TempDir(), "bpf")
	must(t, os.Mkdir(pins, 0o700), "make pins")
	must(t, unix.Mount("bpf", pins, "bpf", 0, ""), "mount bpffs")
	t.Cleanup(func() {
		if err := unix.Unmount(pins, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	l.cfg = Config{BPFFS: filepath.Join(pins, "host"), CgroupRoot: l.cgroups["."], Overlay4: overlay4, Overlay6: overlay6, SweepEvery: -1}
	l.byClsact(os.Getenv(clsactEnv) != "")
	return l
}

func must(t testing.TB, err error, what string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func (l *lab) namespace() int {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(l.t, err, "open namespace")
	l.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// inFar runs f in the namespace at the other end of the underlay.
func (l *lab) inFar(f func()) {
	l.t.Helper()
	must(l.t, unix.Setns(l.far, unix.CLONE_NEWNET), "enter far namespace")
	defer func() { must(l.t, unix.Setns(l.home, unix.CLONE_NEWNET), "come home") }()
	f()
}

func cgroup2Mount(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	must(t, err, "read mounts")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Fatal("no cgroup v2 is mounted")
	return ""
}

func (l *lab) makeCgroups() {
	root, err := os.MkdirTemp(cgroup2Mount(l.t), "signet-enforce-")
	must(l.t, err, "make cgroup")
	for _, name := range []string{".", "a", "a/deep", "b", "other"} {
		dir := filepath.Join(root, name)
		if name != "." {
			must(l.t, os.Mkdir(dir, 0o755), "make cgroup")
		}
		l.cgroups[name] = dir
		id, err := CgroupID(dir)
		must(l.t, err, "cgroup id")
		l.ids[name] = id
	}
	l.t.Cleanup(func() {
		for _, name := range []string{"a/deep", "a", "b", "other", "."} {
			// Processes that were killed leave their cgroup a moment later.
			for range 200 {
				if err = unix.Rmdir(l.cgroups[name]); !errors.Is(err, unix.EBUSY) {
					break
				}
				runtime.Gosched()
				_, _ = os.ReadFile("/proc/self/stat")
			}
			if err != nil {
				l.t.Logf("remove cgroup %s: %v", name, err)
			}
		}
	})
}

func (l *lab) makeDevices() {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	must(l.t, err, "open /dev/net/tun")
	l.t.Cleanup(func() { unix.Close(fd) })
	req, err := unix.NewIfreq("sig0")
	must(l.t, err, "ifreq")
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	must(l.t, unix.IoctlIfreq(fd, unix.TUNSETIFF, req), "make tun")
	l.tun = fd
	l.ip(fmt.Sprintf("link add under0 type veth peer name far0 netns /proc/%d/fd/%d", os.Getpid(), l.far))
	l.inFar(func() {
		l.ip("addr add 10.99.0.2/24 dev far0")
		l.ip("link set far0 up")
	})
	for _, cmd := range []string{
		"link set lo up", "addr add 10.99.0.1/24 dev under0", "link set under0 up",
		"addr add 198.18.0.5/32 dev sig0", "addr add 198.18.0.6/32 dev sig0",
		"addr add fd5a:7::5/128 dev sig0 nodad", "addr add fd5a:7::6/128 dev sig0 nodad",
	} {
		l.ip(cmd)
	}
	must(l.t, os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0), "allow ping sockets")
	must(l.t, os.WriteFile("/proc/sys/net/ipv6/conf/under0/accept_dad", []byte("0"), 0), "no address detection")
	l.tunnel, l.veth = l.index("sig0"), l.index("under0")
}

func (l *lab) index(name string) int {
	l.t.Helper()
	d, err := net.InterfaceByName(name)
	must(l.t, err, "find "+name)
	return d.Index
}

// open attaches the judge, and raises the tunnel after it.
func (l *lab) open() *Enforcer {
	l.t.Helper()
	e, err := Open(l.cfg)
	must(l.t, err, "open")
	l.t.Cleanup(func() { must(l.t, e.Close(), "close") })
	must(l.t, e.AttachTunnel(l.tunnel), "attach tunnel")
	for _, cmd := range []string{
		"link set sig0 up", "route replace 198.18.0.0/15 dev sig0", "route replace fd5a:7::/48 dev sig0",
	} {
		l.ip(cmd)
	}
	return e
}

// view knows A and B on this host and one remote workload. Nothing is allowed yet.
func (l *lab) view() *policy.View {
	return &policy.View{
		Overlay4: overlay4, Overlay6: overlay6, Revision: 7,
		Lease: policy.Lease{Ends: time.Now().Add(time.Hour)},
		Addresses: map[netip.Addr]policy.Address{
			a4: {Number: numA, Local: true}, a6: {Number: numA, Local: true},
			b4: {Number: numB, Local: true}, b6: {Number: numB, Local: true},
			remote4: {Number: numRemote}, remote6: {Number: numRemote},
		},
		Locals: map[policy.LocalKey]identity.Number{
			{Cgroup: l.ids["a"], UID: policy.AnyUID}: numA,
			{Cgroup: l.ids["b"], UID: policy.AnyUID}: numB,
		},
		Rulesets: map[identity.Number]policy.Ruleset{numA: {}, numB: {}},
	}
}

// permit allows a service from one number to another, in the rulesets of the ends that are here.
func permit(v *policy.View, rule uint32, from, to identity.Number, proto flow.Proto, port uint16) {
	val := policy.Value{Allow: policy.Slot{Rule: rule}}
	if rs := v.Rulesets[from]; rs != nil {
		rs[policy.Key{Peer: to, Port: port, Proto: proto, Dir: policy.Egress}] = val
	}
	if rs := v.Rulesets[to]; rs != nil {
		rs[policy.Key{Peer: from, Port: port, Proto: proto, Dir: policy.Ingress}] = val
	}
}

// proc is a process in one of the cgroups, in the lab's namespace, that does what it is told (helper_test.go).
type proc struct {
	t   *testing.T
	in  *os.File
	out *bufio.Reader
}

// startFar runs a process of nobody at the other end of the underlay.
func (l *lab) startFar() (p *proc) {
	l.inFar(func() { p = l.start("other") })
	return p
}

// start runs a process. It ends with the test.
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

// do gives one command and returns the answer.
func (p *proc) do(format string, args ...any) string {
	p.t.Helper()
	cmd := fmt.Sprintf(format, args...)
	if _, err := fmt.Fprintln(p.in, cmd); err != nil {
		p.t.Fatalf("%s: %v", cmd, err)
	}
	answer, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("%s: helper ended: %v", cmd, err)
	}
	return strings.TrimSpace(answer)
}

// want is do with an expected answer.
func (p *proc) want(answer, format string, args ...any) {
	p.t.Helper()
	if got := p.do(format, args...); got != answer {
		p.t.Errorf("%s: got %q, want %q", fmt.Sprintf(format, args...), got, answer)
	}
}

// eventually repeats a command until its answer is the expected one.
func (p *proc) eventually(answer, cmd string) {
	p.t.Helper()
	got := p.do("%s", cmd)
	for end := time.Now().Add(helperWait); got != answer && time.Now().Before(end); {
		got = p.do("%s", cmd)
	}
	if got != answer {
		p.t.Errorf("%s: got %q, want %q", cmd, got, answer)
	}
}

// wire returns the first packet that leaves by the tunnel and that match accepts, or nil after a while.
func (l *lab) wire(wait time.Duration, match func([]byte) bool) []byte {
	l.t.Helper()
	buf := make([]byte, 65536)
	for end := time.Now().Add(wait); time.Now().Before(end); {
		fds := []unix.PollFd{{Fd: int32(l.tun), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, int(time.Until(end).Milliseconds())+1); n == 0 || errors.Is(err, unix.EINTR) {
			continue
		}
		n, err := unix.Read(l.tun, buf)
		if err != nil {
			continue
		}
		if match(buf[:n]) {
			return bytes.Clone(buf[:n])
		}
	}
	return nil
}

// inject lets a packet arrive by the tunnel.
func (l *lab) inject(packet []byte) {
	l.t.Helper()
	if _, err := unix.Write(l.tun, packet); err != nil {
		l.t.Fatalf("write to the tunnel: %v", err)
	}
}

// sent waits for a packet from a source address to a port, and fails without one.
func (l *lab) sent(what string, from netip.Addr, toPort uint16) []byte {
	l.t.Helper()
	p := l.wire(helperWait, func(b []byte) bool {
		_, dst := portsOf(b)
		return sourceOf(b) == from && dst == toPort
	})
	if p == nil {
		l.t.Errorf("%s: nothing from %v to port %d left by the tunnel", what, from, toPort)
	}
	return p
}

// silent fails when anything but the kernel's own chatter leaves by the tunnel within a short while.
func (l *lab) silent(what string) {
	l.t.Helper()
	if p := l.wire(quiet, func([]byte) bool { return true }); p != nil {
		l.t.Errorf("%s: %x left by the tunnel", what, p)
	}
}

// quiet is how long a test waits for what must not come.
const quiet = 150 * time.Millisecond

// denied is how often a reason was counted at a hook.
func denied(t *testing.T, e *Enforcer, hook policy.Hook, r flow.Reason) uint64 {
	t.Helper()
	c, err := e.Counters()
	must(t, err, "counters")
	return c.Verdicts[CounterKey{Verdict: flow.Deny, Reason: r, Hook: hook}]
}

func (l *lab) ip(args string) {
	l.t.Helper()
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}
