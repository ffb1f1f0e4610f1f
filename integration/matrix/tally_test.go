package matrix

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/integration/scenario"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// tally reads the judge's counters of one host, hook by hook: the status adds the hooks up. It asks the kernel for the
// pinned map, so that nothing of the agent stands between.
type tally struct {
	fd   int
	cpus int
	// What the kernel reads and writes by address must not move, so it is on the heap.
	key   *uint32
	value []byte
}

// hookNames are those of the flow records' source, in the order of policy.Hook.
var hookNames = []string{
	policy.HookConnect: "connect", policy.HookBind: "bind", policy.HookEgressSocket: "egress", policy.HookIngressSocket: "ingress",
	policy.HookEgressDevice: "tunnel_egress", policy.HookIngressDevice: "tunnel_ingress", policy.HookGuard: "guard", policy.HookLoopback: "lo_egress",
}

// Commands of bpf(2) and struct bpf_attr, as far as they are needed.
const (
	mapLookup = 1
	objGet    = 7
)

type objectAttr struct {
	path  uint64
	fd    uint32
	flags uint32
}

type lookupAttr struct {
	fd         uint32
	_          uint32
	key, value uint64
	flags      uint64
}

func openTally(t *testing.T, a *scenario.Agent) *tally {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(a.Host.BPFFS(), "signet", "*", "maps", "counters"))
	if err != nil || len(pins) != 1 {
		t.Fatalf("counters of %s: %v %v", a.Host.Name(), pins, err)
	}
	path, err := unix.BytePtrFromString(pins[0])
	must(t, err)
	attr := objectAttr{path: uint64(uintptr(unsafe.Pointer(path)))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, objGet, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		t.Fatalf("open %s: %v", pins[0], errno)
	}
	t.Cleanup(func() { unix.Close(int(fd)) })
	text, err := os.ReadFile("/sys/devices/system/cpu/possible")
	must(t, err)
	first, last := 0, 0
	if n, _ := fmt.Sscanf(strings.TrimSpace(string(text)), "%d-%d", &first, &last); n < 1 {
		t.Fatalf("possible CPUs: %q", text)
	}
	cpus := max(first, last) + 1
	return &tally{fd: int(fd), cpus: cpus, key: new(uint32), value: make([]byte, 8*cpus)}
}

// cell is a hook and a reason.
type cell struct{ hook, reason string }

// denied reads how often each hook refused for each reason.
func (c *tally) denied(t *testing.T) map[cell]uint64 {
	t.Helper()
	out := map[cell]uint64{}
	for hook, name := range hookNames {
		for _, r := range flow.Reasons() {
			*c.key = uint32((int(flow.Deny)*bpf.CounterHooks+hook)*bpf.CounterReasons + int(r.Code))
			attr := lookupAttr{fd: uint32(c.fd), key: uint64(uintptr(unsafe.Pointer(c.key))), value: uint64(uintptr(unsafe.Pointer(&c.value[0])))}
			if _, _, errno := unix.Syscall(unix.SYS_BPF, mapLookup, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
				t.Fatalf("read counter %d: %v", *c.key, errno)
			}
			var sum uint64
			for i := range c.cpus {
				sum += binary.NativeEndian.Uint64(c.value[8*i:])
			}
			out[cell{name, r.Name}] = sum
		}
	}
	return out
}

// since is what was refused after an earlier reading.
func (c *tally) since(t *testing.T, before map[cell]uint64) map[cell]uint64 {
	t.Helper()
	out := map[cell]uint64{}
	for k, n := range c.denied(t) {
		if n > before[k] {
			out[k] = n - before[k]
		}
	}
	return out
}
