package enforce

import (
	"cmp"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	devices "github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// clsactEnv makes every lab judge its devices by clsact.
const clsactEnv = "SIGNET_ENFORCE_CLSACT"

// byClsact gives the lab filters, and uses them where on.
func (l *lab) byClsact(on bool) {
	l.t.Helper()
	c, err := devices.NewClsact()
	must(l.t, err, "open clsact")
	l.t.Cleanup(func() { must(l.t, c.Close(), "close clsact") })
	l.cfg.Filters, l.cfg.Clsact = c, on
}

func (l *lab) tc(args string) string {
	l.t.Helper()
	cmd := exec.Command("tc", strings.Fields(args)...)
	cmd.Stdin = strings.NewReader(cmp.Or(l.takes, "1,6 0 0 0")) // a classic program that accepts everything, for those who ask
	out, err := cmd.CombinedOutput()
	if err != nil {
		l.t.Fatalf("tc %s: %v: %s", args, err, out)
	}
	return string(out)
}

// linkTests are about links and their pins, which filters do not have.
var linkTests = []string{"TestDetached", "TestUnpinnable", "TestAhead"}

// TestKernelByClsact runs the tests of kernel_test.go and ensure_test.go once more, by clsact.
func TestKernelByClsact(t *testing.T) {
	if testing.Short() {
		t.Skip("runs every kernel test once more: left out of -short")
	}
	needRoot(t)
	if os.Getenv(clsactEnv) != "" {
		t.Skip("all of this run is by clsact")
	}
	var names []string
	for _, file := range []string{"kernel_test.go", "ensure_test.go"} {
		text, err := os.ReadFile(file)
		must(t, err, "read tests")
		for line := range strings.Lines(string(text)) {
			name, _, ok := strings.Cut(strings.TrimPrefix(line, "func "), "(")
			if ok && strings.HasPrefix(name, "Test") && !slices.Contains(linkTests, name) {
				names = append(names, name)
			}
		}
	}
	if len(names) < 10 {
		t.Fatalf("found the tests %v only", names)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^("+strings.Join(names, "|")+")$", "-test.v")
	cmd.Env = append(os.Environ(), clsactEnv+"=1")
	out, err := cmd.CombinedOutput()
	if ran := strings.Count(string(out), "\n--- PASS: "); err != nil || ran != len(names) {
		t.Errorf("%d of %d tests passed: %v\n%s", ran, len(names), err, out)
	}
}

// TestClsactNextToOthers: filters of others run after ours, and stay, whatever comes and goes.
func TestClsactNextToOthers(t *testing.T) {
	l := newLab(t)
	l.byClsact(true)
	const theirs = " egress prio 9 protocol all bpf da bytecode-file /dev/stdin"
	l.tc("qdisc add dev sig0 clsact")
	l.tc("filter add dev sig0" + theirs)
	l.tc("filter add dev sig0 egress prio 1 protocol all bpf da bytecode-file /dev/stdin") // one that takes all, in our priority
	e := l.open()
	for _, h := range e.Hooks() {
		must(t, h.Err, h.Name)
	}
	if len(e.links) != len(cgroupHooks) {
		t.Errorf("%d links beside the cgroup's", len(e.links)-len(cgroupHooks))
	}
	// A packet socket is judged at the device only: its packet must be refused before their filter can take it.
	p := l.start("other")
	p.do("socket packet")
	p.do("rawsend 198.18.0.5:1000 198.18.1.9:53 %d", l.tunnel)
	l.silent("a forged packet")
	if denied(t, e, policy.HookEgressDevice, flow.LeaseEnded) == 0 { // no view is in force
		t.Error("the device's judge did not run")
	}
	if out := l.tc("-s filter show dev sig0 egress"); strings.Count(out, "pref 9") == 0 || strings.Count(out, filterName+" direct-action") != 1 {
		t.Errorf("filters: %s", out)
	}
	must(t, e.Close(), "close")
	must(t, Release(l.cfg), "release")
	if out := l.tc("filter show dev sig0 egress"); strings.Contains(out, filterName+" direct") || !strings.Contains(out, "pref 9") {
		t.Errorf("after the release: %s", out)
	}
	if out := l.tc("qdisc show"); strings.Count(out, "clsact") != 1 {
		t.Errorf("after the release: %s", out)
	}
}

// TestClsactPasses: what ours pass goes on to the filters of others, as it goes on to the next program of tcx.
func TestClsactPasses(t *testing.T) {
	l := newLab(t)
	l.byClsact(true)
	l.open()
	l.takes = "1,6 0 0 2" // drop
	l.tc("filter add dev under0 egress prio 9 protocol ip bpf da bytecode-file /dev/stdin")
	far, p := l.startFar(), l.start("other")
	far.do("socket udp4")
	far.want("ok", "bind 10.99.0.2:9999")
	p.do("socket udp4")
	p.do("sendto 10.99.0.2:9999 first") // to the neighbour's address, which is asked for with another protocol
	p.do("sendto 10.99.0.2:9999 second")
	far.want("ETIMEDOUT", "recv")
	l.tc("filter del dev under0 egress prio 9")
	p.want("ok", "sendto 10.99.0.2:9999 third")
	if got := far.do("recv"); !strings.HasPrefix(got, "third") {
		t.Errorf("received %q", got)
	}
}

// TestClsactFlushed: what another tool deletes or replaces is told, and put back.
func TestClsactFlushed(t *testing.T) {
	l := newLab(t)
	l.byClsact(true)
	e := l.open()
	guardOut, guardIn := guardNames(l.veth)
	for command, want := range map[string][]string{
		"filter del dev sig0 egress":                       {hookTunnelEgress},
		"qdisc del dev sig0 clsact":                        {hookTunnelEgress, hookTunnelIngress},
		"filter del dev under0 ingress prio 1":             {guardIn},
		"qdisc replace dev lo clsact":                      nil,
		"qdisc del dev lo clsact":                          {hookLoopback},
		"filter del dev under0 egress prio 1 protocol all": {guardOut},
		"filter replace dev sig0 ingress prio 1 handle 0x51670001 protocol all bpf da bytecode-file /dev/stdin": {hookTunnelIngress},
	} {
		l.tc(command)
		for _, name := range want {
			if hookErr(t, e, name) == nil {
				t.Errorf("%s: %s is reported attached", command, name)
			}
		}
		if repaired := ensured(t, e); !slices.Equal(repaired, want) {
			t.Errorf("%s: repaired %v, want %v", command, repaired, want)
		}
		for _, name := range want {
			must(t, hookErr(t, e, name), name)
		}
	}
}

// TestClsactOutlivesTheProcess: a filter stands without a process, and the next process replaces it in one step; changing
// between the two ways leaves nothing of the other.
func TestClsactOutlivesTheProcess(t *testing.T) {
	l := newLab(t)
	modes := map[bool]string{true: "clsact", false: "tcx"}
	var last *Enforcer
	filters := func() int {
		n := 0
		for _, dev := range []string{"sig0", "under0", "lo"} {
			for _, side := range []string{"ingress", "egress"} {
				n += strings.Count(l.tc("filter show dev "+dev+" "+side), filterName+" direct-action")
			}
		}
		return n
	}
	for _, on := range []bool{true, true, false, true, false, false} {
		if last != nil {
			must(t, last.Close(), "close")
			l.ip("link set sig0 up")
		}
		l.cfg.Clsact = on
		last = l.open()
		for _, h := range last.Hooks() {
			must(t, h.Err, modes[on]+" "+h.Name)
		}
		links, err := os.ReadDir(l.cfg.links())
		must(t, err, "list pins")
		wantLinks, wantFilters := len(cgroupHooks), 5 // two on the tunnel, two on the underlay, one on loopback
		if !on {
			wantLinks, wantFilters = wantLinks+5, 0
		}
		if len(links) != wantLinks || filters() != wantFilters {
			t.Errorf("by %s: %d links and %d filters, want %d and %d", modes[on], len(links), filters(), wantLinks, wantFilters)
		}
	}
	l.cfg.Clsact = true
	must(t, last.Close(), "close")
	last, err := Open(l.cfg)
	must(t, err, "open")
	must(t, last.AttachTunnel(l.tunnel), "tunnel")
	must(t, last.Close(), "close")
	// Nobody is there, and overlay packets still do not leave by the underlay.
	p := l.start("other")
	l.ip("route replace 198.18.0.0/15 dev under0")
	p.do("socket packet")
	p.do("rawsend 198.18.0.5:1000 198.18.1.9:53 %d", l.veth)
	again, err := Open(l.cfg)
	must(t, err, "open again")
	defer again.Close()
	if again.tunnel != l.tunnel {
		t.Errorf("the tunnel of the process before is not known: %d", again.tunnel)
	}
	if denied(t, again, policy.HookGuard, flow.NotTunnel) == 0 {
		t.Error("the guard did not run without a process")
	}
}

// TestNoWayToDevices: without tcx and without filters the start is refused.
func TestNoWayToDevices(t *testing.T) {
	if _, err := chooseClsact(Config{Clsact: true}); !errors.Is(err, ErrNoTCX) {
		t.Errorf("got %v, want ErrNoTCX", err)
	}
}

// failing is a Filters of which each call fails once.
type failing struct {
	Filters
	after int // calls that succeed first
}

var errOnce = errors.New("failed once")

func (f *failing) fail() bool { f.after--; return f.after == -1 }

func (f *failing) Attach(i int, egress bool, h uint32, name string, p int) error {
	if f.fail() {
		return errOnce
	}
	return f.Filters.Attach(i, egress, h, name, p)
}

func (f *failing) Program(i int, egress bool, h uint32) (uint32, error) {
	if f.fail() {
		return 0, errOnce
	}
	return f.Filters.Program(i, egress, h)
}

// TestClsactCallsFailOnce: whatever netlink call fails, either the start is refused or what is missing is told and the
// next look mends it.
func TestClsactCallsFailOnce(t *testing.T) {
	l := newLab(t)
	l.byClsact(true)
	real := l.cfg.Filters
	for after := range 14 {
		f := &failing{Filters: real, after: after}
		l.cfg.Filters = f
		e, err := Open(l.cfg)
		if err == nil {
			err = e.AttachTunnel(l.tunnel)
		}
		if err != nil && !errors.Is(err, errOnce) {
			t.Errorf("call %d: %v", after, err)
		}
		if e == nil {
			continue
		}
		if err != nil {
			must(t, e.AttachTunnel(l.tunnel), "attach again")
		}
		ensured(t, e)
		for _, h := range e.Hooks() {
			if h.Err != nil {
				t.Errorf("call %d: %s: %v", after, h.Name, h.Err)
			}
		}
		must(t, e.Close(), "close")
	}
}
