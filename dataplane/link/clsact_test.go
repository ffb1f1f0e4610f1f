package link

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const testHandle = 0x53000001

// foreign is a filter of another tool: one that passes everything.
const foreign = "bpf da bytecode-file /dev/stdin"

// tc runs a command of another tool.
func (s *space) tc(command string) string {
	s.t.Helper()
	var out []byte
	var err error
	s.do(func() {
		cmd := exec.Command("tc", strings.Fields(command)...)
		cmd.Stdin = strings.NewReader("1,6 0 0 0")
		out, err = cmd.CombinedOutput()
	})
	if err != nil {
		s.t.Fatalf("tc %s: %v: %s", command, err, out)
	}
	return string(out)
}

func (s *space) clsact() (c *Clsact, index int) {
	s.t.Helper()
	s.must(func() (err error) {
		c, err = NewClsact()
		return err
	})
	s.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			s.t.Error(err)
		}
	})
	s.must(func() error {
		all, err := Links()
		for _, l := range all {
			if l.Name == tunnel {
				index = l.Index
			}
		}
		return err
	})
	return c, index
}

// TestClsactWithoutAProgram has no program to attach (enforce's tests have them), so that everything is refused and
// nothing is left: what tells a missing filter from a missing device, and whose filters stay.
func TestClsactWithoutAProgram(t *testing.T) {
	h := newHost(t)
	c, index := h.clsact()
	if _, err := c.Program(index, true, testHandle); !errors.Is(err, ErrNoFilter) || errors.Is(err, unix.ENODEV) {
		t.Errorf("no queueing discipline: %v", err)
	}
	if _, err := c.Program(9999, true, testHandle); !errors.Is(err, ErrNoFilter) || !errors.Is(err, unix.ENODEV) {
		t.Errorf("no device: %v", err)
	}
	for _, i := range []int{index, 9999} {
		if err := errors.Join(c.Detach(i, true, testHandle), c.Clear(i, testHandle)); err != nil && i == index {
			t.Errorf("detach what is not there: %v", err)
		}
	}
	if err := c.Attach(9999, true, testHandle, "x", 0); !errors.Is(err, unix.ENODEV) {
		t.Errorf("attach to no device: %v", err)
	}
	if err := c.Attach(index, true, testHandle, "x", 0); err == nil {
		t.Error("a descriptor that is no program was attached")
	}
	h.tc("filter add dev " + tunnel + " egress prio 7 protocol all " + foreign)
	if err := c.Clear(index, testHandle); err != nil {
		t.Errorf("clear: %v", err)
	}
	if out := h.tc("filter show dev " + tunnel + " egress"); !strings.Contains(out, "pref 7") {
		t.Errorf("another tool's filter is gone: %q", out)
	}
}

// TestClsactConflict: what keeps a filter from the place that it needs is named.
func TestClsactConflict(t *testing.T) {
	h := newHost(t)
	c, index := h.clsact()
	h.tc("qdisc add dev " + tunnel + " ingress")
	// An egress filter would run on the way in there.
	if err := c.Attach(index, true, testHandle, "x", 0); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "ingress") {
		t.Errorf("on the ingress discipline: %v", err)
	}
	h.tc("qdisc del dev " + tunnel + " ingress")
	h.tc("qdisc add dev " + tunnel + " clsact")
	h.tc("filter add dev " + tunnel + " egress prio 1 protocol ip " + foreign)
	if err := c.Attach(index, true, testHandle, "x", 0); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "0x0800") {
		t.Errorf("at a priority that another kind holds: %v", err)
	}
}

// TestWatchFilters: filters that go are told, alone or with their queueing discipline.
func TestWatchFilters(t *testing.T) {
	h := newHost(t)
	_, index := h.clsact()
	h.tc("qdisc add dev " + tunnel + " clsact")
	events := h.watch()
	h.tc("filter add dev " + tunnel + " egress prio 7 protocol all " + foreign)
	await(t, events, "added", func(e Event) bool { return e.Kind == FilterChanged && e.Index == index && !e.Gone })
	h.tc("filter del dev " + tunnel + " egress")
	await(t, events, "deleted", func(e Event) bool { return e.Kind == FilterChanged && e.Index == index && e.Gone })
	events = h.watch()
	h.tc("qdisc del dev " + tunnel + " clsact")
	await(t, events, "flushed", func(e Event) bool { return e.Kind == FilterChanged && e.Index == index && e.Gone })
}
