package enforce

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// programIDs are the kernel's numbers of what is attached, by the names of the pins.
func programIDs(t *testing.T, cfg Config) map[string]ebpf.ProgramID {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(cfg.links(), "*"))
	must(t, err, "list pins")
	out := map[string]ebpf.ProgramID{}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		must(t, err, "open link")
		info, err := l.Info()
		must(t, err, "read link")
		out[filepath.Base(pin)] = info.Program
		must(t, l.Close(), "close link")
	}
	return out
}

// TestAdopt: a start of the same build takes over what is attached; another configuration, a program that somebody put
// in the place of ours, and a host without notes are loaded anew.
func TestAdopt(t *testing.T) {
	l := newLab(t)
	if l.cfg.Clsact {
		t.Skip("needs tcx: filters have no links to be known by")
	}
	e := l.open()
	must(t, e.Apply(t.Context(), l.view()), "apply")
	first := programIDs(t, l.cfg)
	if len(first) < 10 {
		t.Fatalf("only %d links", len(first))
	}
	reopen := func(cfg Config) map[string]ebpf.ProgramID {
		t.Helper()
		must(t, e.Close(), "close")
		l.cfg = cfg
		e = l.open()
		for _, h := range e.Hooks() {
			if !h.Attached {
				t.Errorf("%s is not attached: %v", h.Name, h.Err)
			}
		}
		return programIDs(t, cfg)
	}
	same := func(a, b map[string]ebpf.ProgramID) (n int) {
		for name, id := range a {
			if b[name] == id {
				n++
			}
		}
		return n
	}
	cfg := l.cfg
	if again := reopen(cfg); same(first, again) != len(first) {
		t.Errorf("%d of %d programs were taken over", same(first, again), len(first))
	}
	other := cfg
	other.Sizes.Quota = 4711
	changed := reopen(other)
	if same(first, changed) != 0 {
		t.Errorf("%d programs of another configuration were taken over", same(first, changed))
	}
	// Somebody replaces the program of one link by one that lets everything pass.
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "GPL", Instructions: passAll()})
	must(t, err, "load a foreign program")
	defer foreign.Close()
	must(t, e.Close(), "close")
	pinned, err := link.LoadPinnedLink(filepath.Join(cfg.links(), "egress"), nil)
	must(t, err, "open link")
	must(t, pinned.Update(foreign), "replace the program")
	must(t, pinned.Close(), "close link")
	e = l.open()
	now := programIDs(t, cfg)
	info, err := foreign.Info()
	must(t, err, "read the foreign program")
	if id, _ := info.ID(); now["egress"] == id || now["egress"] == changed["egress"] {
		t.Errorf("the foreign program %d was taken over: %d", id, now["egress"])
	}
	if n := same(changed, now); n != len(changed)-1 {
		t.Errorf("%d of %d other programs were taken over", n, len(changed)-1)
	}
	must(t, e.Close(), "close")
	must(t, forgetBuild(l.cfg), "forget")
	e = l.open()
	if n := same(now, programIDs(t, cfg)); n != 0 {
		t.Errorf("%d programs were taken over without a note", n)
	}
}

// passAll is a program that returns 1.
func passAll() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}
}
