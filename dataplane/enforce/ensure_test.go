package enforce

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// hookErr is what Hooks says of a hook: nil when it stands.
func hookErr(t *testing.T, e *Enforcer, name string) error {
	t.Helper()
	for _, h := range e.Hooks() {
		if h.Name == name {
			if h.Attached != (h.Err == nil) {
				t.Errorf("%s is attached: %v, with %v", name, h.Attached, h.Err)
			}
			return h.Err
		}
	}
	t.Fatalf("Hooks does not name %s", name)
	return nil
}

// ensured names what Ensure has repaired.
func ensured(t *testing.T, e *Enforcer) (names []string) {
	t.Helper()
	repaired, err := e.Ensure()
	must(t, err, "ensure")
	for _, r := range repaired {
		names = append(names, r.Hook)
	}
	return names
}

// TestDetached: what another tool detaches from its hook is told, and attached again.
func TestDetached(t *testing.T) {
	l := newLab(t)
	e := l.open()
	egress, _ := guardNames(l.veth)
	names := []string{egress, "ingress", hookTunnelIngress}
	for _, h := range e.Hooks() {
		if !h.Attached {
			t.Errorf("%s: %v", h.Name, h.Err)
		}
	}
	for range 2 {
		for _, name := range names {
			other, err := link.LoadPinnedLink(filepath.Join(l.cfg.links(), name), nil)
			must(t, err, "open link")
			must(t, other.Detach(), "detach")
			must(t, other.Close(), "close")
			if hookErr(t, e, name) == nil {
				t.Errorf("%s is detached and reported attached", name)
			}
		}
		repaired := ensured(t, e)
		if !slices.Equal(repaired, names) {
			t.Errorf("repaired %v, want %v", repaired, names)
		}
		for _, name := range names {
			must(t, hookErr(t, e, name), name)
		}
	}
	// Another program in the link, and a pin that somebody removed.
	other, err := link.LoadPinnedLink(filepath.Join(l.cfg.links(), hookLoopback), nil)
	must(t, err, "open link")
	must(t, other.Update(e.coll.Programs[hookGuard]), "replace program")
	must(t, other.Close(), "close")
	must(t, os.Remove(filepath.Join(l.cfg.links(), "bind4")), "remove pin")
	repaired, err := e.Ensure()
	must(t, err, "ensure")
	if len(repaired) != 2 || repaired[0].Hook != "bind4" || repaired[1].Hook != hookLoopback {
		t.Fatalf("repaired %v", repaired)
	}
	// What stood there, where, and who loaded it.
	if r := repaired[1]; r.Where != "device lo" || !errors.Is(r.Cause, errOtherProgram) || !strings.Contains(r.Cause.Error(), `"guard", loaded by user 0`) {
		t.Errorf("%s %s: %v", r.Hook, r.Where, r.Cause)
	}
	if r := repaired[0]; r.Where != "cgroup "+l.cfg.CgroupRoot || !errors.Is(r.Cause, errNotPinned) {
		t.Errorf("%s %s: %v", r.Hook, r.Where, r.Cause)
	}
	if again := ensured(t, e); len(again) > 0 {
		t.Errorf("nothing is missing, and %v were repaired", again)
	}
}

// TestAhead: a program that somebody puts before ours is named, and forgotten when it is gone.
func TestAhead(t *testing.T) {
	l := newLab(t)
	e := l.open()
	if all := e.Ahead(); len(all) > 0 {
		t.Errorf("nobody is before us, and %q are", all)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "intruder", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	must(t, err, "load program")
	defer prog.Close()
	for anchor, want := range map[link.Anchor]int{link.Head(): 1, link.Tail(): 0} {
		other, err := link.AttachTCX(link.TCXOptions{Interface: l.tunnel, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: anchor})
		must(t, err, "attach")
		all := e.Ahead()
		if len(all) != want || want > 0 && !strings.Contains(all[0], `"intruder", loaded by user 0 stands before the judge's hook tunnel_ingress at device sig0`) {
			t.Errorf("got %q", all)
		}
		must(t, other.Close(), "detach")
	}
}

// TestUnpinnable: a link that cannot be pinned judges while the process lives, and is reported.
func TestUnpinnable(t *testing.T) {
	l := newLab(t)
	e := l.open()
	l.ip("link add late0 type veth peer name late1")
	late := l.index("late0")
	egress, ingress := guardNames(late)
	inTheWay := filepath.Join(l.cfg.links(), egress)
	must(t, os.Mkdir(inTheWay, 0o700), "take the pin's name")
	if e.AttachGuard(late, "late0") == nil {
		t.Error("a guard without a pin is no error")
	}
	if hookErr(t, e, egress) == nil {
		t.Error("a guard without a pin is reported attached")
	}
	must(t, hookErr(t, e, ingress), "the other guard")
	if held := e.links[egress]; held == nil {
		t.Error("a guard that cannot be pinned was detached")
	} else if h := e.wants[egress]; h.stands(held) != nil {
		t.Errorf("a guard that cannot be pinned does not stand: %v", h.stands(held))
	}
	if _, err := e.Ensure(); err == nil {
		t.Error("ensure has no error")
	}
	must(t, os.Remove(inTheWay), "give the name back")
	if repaired := ensured(t, e); !slices.Equal(repaired, []string{egress}) {
		t.Errorf("repaired %v", repaired)
	}
	must(t, hookErr(t, e, egress), "the guard")

	// A pin stays where it is until its successor is pinned; what an interruption left goes with the next start.
	must(t, e.Close(), "close")
	path := filepath.Join(l.cfg.links(), hookLoopback)
	left, err := link.LoadPinnedLink(path, nil)
	must(t, err, "open link")
	must(t, os.Remove(path), "remove pin")
	must(t, left.Pin(path+pinNext), "leave a pin")
	must(t, left.Close(), "close")
	again := l.open()
	if _, err := os.Lstat(path + pinNext); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an unfinished pin is left: %v", err)
	}
	must(t, hookErr(t, again, hookLoopback), "loopback")
}

// TestDeviceChurn: devices that come and go leave no link, pin or descriptor.
func TestDeviceChurn(t *testing.T) {
	l := newLab(t)
	e := l.open()
	pins := func() int {
		all, err := os.ReadDir(l.cfg.links())
		must(t, err, "list pins")
		return len(all)
	}
	before, links, hooks := pins(), len(e.links), len(e.wants)
	for range 5 {
		l.ip("link add late0 type veth peer name late1")
		for _, name := range []string{"late0", "late1"} {
			must(t, e.AttachGuard(l.index(name), name), "guard")
		}
		if !slices.Contains(e.Guards(), l.index("late1")) {
			t.Errorf("Guards %v has no late1", e.Guards())
		}
		l.ip("link del late0")
		for _, h := range e.Hooks() {
			if !h.Attached {
				t.Errorf("a device that is gone makes the host unhealthy: %s %v", h.Name, h.Err)
			}
		}
		if repaired, err := e.Ensure(); err != nil || len(repaired) > 0 {
			t.Errorf("repaired %v, %v", repaired, err)
		}
	}
	if pins() != before || len(e.links) != links || len(e.wants) != hooks {
		t.Errorf("%d pins, %d links, %d hooks; before %d, %d and %d", pins(), len(e.links), len(e.wants), before, links, hooks)
	}
}
