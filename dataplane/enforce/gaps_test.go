package enforce

import (
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestLacks: what is not answered with a clear yes is missing, and without the right to ask nothing is known.
func TestLacks(t *testing.T) {
	only := func(kind ebpf.ProgramType, err error) func(ebpf.ProgramType, ebpf.AttachType) error {
		return func(k ebpf.ProgramType, _ ebpf.AttachType) error {
			if k == kind {
				return err
			}
			return nil
		}
	}
	names := func(all []Lack) (out []string) {
		for _, l := range all {
			out = append(out, l.Hook)
		}
		return out
	}
	for _, c := range []struct {
		name    string
		without []string
		probe   func(ebpf.ProgramType, ebpf.AttachType) error
		want    []string
	}{
		{"nothing is missing", nil, only(ebpf.Kprobe, errOnce), nil},
		{"not supported", nil, only(ebpf.CGroupSockopt, ebpf.ErrNotSupported), []string{hookSetsockopt}},
		{"no clear answer", nil, only(ebpf.CGroupSockopt, unix.ENOMEM), []string{hookSetsockopt}},
		{"an old kernel", nil, only(ebpf.CGroupSockAddr, unix.EINVAL), []string{"connect4", "connect6", "sendmsg4", "sendmsg6", "bind4", "bind6"}},
		{"no packets", nil, only(ebpf.CGroupSKB, unix.EINVAL), []string{"egress", "ingress"}},
		{"configured", []string{"bind6"}, only(ebpf.CGroupSockopt, unix.EINVAL), []string{"bind6", hookSetsockopt}},
	} {
		got, err := lacks(c.without, c.probe)
		if err != nil || !slices.Equal(names(got), c.want) {
			t.Errorf("%s: got %v, %v, want %v", c.name, names(got), err, c.want)
		}
		for _, l := range got {
			if l.Err == nil {
				t.Errorf("%s: %s is missing for no reason", c.name, l.Hook)
			}
		}
	}
	if got, err := lacks(nil, only(ebpf.CGroupSKB, unix.EPERM)); !errors.Is(err, ErrPermission) {
		t.Errorf("without permission: %v, %v", got, err)
	}
}

// TestProbe asks this kernel, which has all.
func TestProbe(t *testing.T) {
	needRoot(t)
	if got, err := Probe(Config{}); err != nil || len(got) > 0 {
		t.Errorf("this kernel lacks %v, %v", got, err)
	}
}

// TestWithoutAHook forces a probe to fail. Nothing is attached before the refusal; when it is accepted, the gap is there.
func TestWithoutAHook(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct{ without, accept []string }{
		{[]string{hookSetsockopt}, nil},
		{[]string{hookSetsockopt, "bind4"}, []string{hookSetsockopt}},
		{[]string{"egress"}, []string{"egress"}}, // nobody can accept that
		{[]string{"ingress"}, []string{"ingress"}},
	} {
		l.cfg.Without, l.cfg.Accept = c.without, c.accept
		if e, err := Open(l.cfg); !errors.Is(err, ErrNoHook) {
			t.Errorf("without %v, accepted %v: %v", c.without, c.accept, err)
			if e != nil {
				must(t, e.Close(), "close")
			}
		}
		if pins, err := os.ReadDir(l.cfg.links()); err != nil || len(pins) > 0 {
			t.Errorf("without %v: %d links, %v", c.without, len(pins), err)
		}
	}
	l.cfg.Without, l.cfg.Accept = []string{hookSetsockopt}, []string{hookSetsockopt}
	e := l.open()
	for _, h := range e.Hooks() {
		if (h.Err != nil) != (h.Name == hookSetsockopt) {
			t.Errorf("%s: %v", h.Name, h.Err)
		}
	}
	if repaired := ensured(t, e); len(repaired) > 0 {
		t.Errorf("repaired %v", repaired)
	}
	p := l.start("other")
	p.do("socket packet")
	p.want("ok", "option 263 20") // PACKET_QDISC_BYPASS: what the hook would have refused
}
