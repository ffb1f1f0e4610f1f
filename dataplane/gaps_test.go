package dataplane

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/enforce"
)

func TestJudgeGaps(t *testing.T) {
	lack := func(hooks ...string) (p probe) {
		for _, h := range hooks {
			p.lacks = append(p.lacks, enforce.Lack{Hook: h, Err: unix.EINVAL})
		}
		return p
	}
	for _, c := range []struct {
		name     string
		found    probe
		accepted []string
		gaps     []string // found
		refused  []string // named by the error; none: accepted
	}{
		{name: "nothing is missing"},
		{name: "accepted and not there", accepted: []string{"no-bind-hook"}},
		{name: "missing", found: lack("setsockopt"), gaps: []string{"no-setsockopt-hook"},
			refused: []string{"setsockopt hook missing: a process with CAP_NET_RAW can", "accept_gaps: [no-setsockopt-hook]", "invalid argument"}},
		{name: "missing and accepted", found: lack("setsockopt"), accepted: []string{"no-setsockopt-hook"}, gaps: []string{"no-setsockopt-hook"}},
		{name: "another accepted", found: lack("setsockopt"), accepted: []string{"no-bind-hook"}, gaps: []string{"no-setsockopt-hook"},
			refused: []string{"accept_gaps: [no-setsockopt-hook]"}},
		{name: "two hooks of one gap", found: lack("bind4", "bind6"), accepted: []string{"no-bind-hook"}, gaps: []string{"no-bind-hook"}},
		{name: "two gaps, one accepted", found: lack("connect6", "sendmsg4"), accepted: []string{"no-connect-hook"},
			gaps: []string{"no-connect-hook", "no-sendmsg-hook"}, refused: []string{"accept_gaps: [no-sendmsg-hook]"}},
		{name: "a namespace's cgroups", found: probe{namespace: true}, gaps: []string{"cgroup-namespace"}, refused: []string{"accept_gaps: [cgroup-namespace]"}},
		{name: "a namespace's cgroups, accepted", found: probe{namespace: true}, accepted: []string{"cgroup-namespace"}, gaps: []string{"cgroup-namespace"}},
		{name: "packets are not judged", found: lack("ingress"), accepted: GapNames(), refused: []string{"hook ingress is missing", "nothing can make up for that"}},
		{name: "an unknown hook", found: lack("tomorrow"), accepted: GapNames(), refused: []string{"hook tomorrow is missing"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			found, err := judgeGaps(c.found, c.accepted)
			var names []string
			for _, f := range found {
				names = append(names, f.name)
			}
			if !slices.Equal(names, c.gaps) {
				t.Errorf("found %v, want %v", names, c.gaps)
			}
			if (err != nil) != (len(c.refused) > 0) || err != nil && !errors.Is(err, ErrGap) {
				t.Fatalf("refused with %v", err)
			}
			for _, says := range c.refused {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("%v does not say %q", err, says)
				}
			}
			if len(c.refused) > 0 && strings.Contains(err.Error(), "no-connect-hook") {
				t.Errorf("what was accepted is refused: %v", err)
			}
		})
	}
	if _, err := judgeGaps(probe{}, []string{"no-bind-hook", "everything"}); !errors.Is(err, ErrUnknownGap) || !strings.Contains(err.Error(), `"everything"`) {
		t.Errorf("an unknown name: %v", err)
	}
}

// TestGapsCoverHooks: each gap says what it means, and each hook that may be missing is the gap of one name.
func TestGapsCoverHooks(t *testing.T) {
	names, hooks := map[string]bool{}, map[string]bool{}
	for _, g := range gaps {
		if names[g.name] || len(g.means) < 40 {
			t.Errorf("gap %q: named twice, or says nothing", g.name)
		}
		names[g.name] = true
		for _, h := range g.hooks {
			if hooks[h] {
				t.Errorf("hook %s is in two gaps", h)
			}
			hooks[h] = true
		}
	}
	for _, h := range []string{"connect4", "connect6", "sendmsg4", "sendmsg6", "bind4", "bind6", "setsockopt"} {
		if !hooks[h] {
			t.Errorf("hook %s is in no gap", h)
		}
	}
	if hooks["egress"] || hooks["ingress"] {
		t.Error("what judges packets is in a gap")
	}
}

// TestForcedGap forces a probe to fail on this kernel: the start is refused until the gap is accepted by name, and then
// status names it for good.
func TestForcedGap(t *testing.T) {
	cfg := newHostConfig(t)
	cfg.without = []string{"setsockopt"}
	if err := Preflight(cfg); !errors.Is(err, ErrGap) {
		t.Errorf("preflight: %v", err)
	}
	if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrGap) || !strings.Contains(err.Error(), "accept_gaps: [no-setsockopt-hook]") {
		t.Errorf("open: %v", err)
	}
	cfg.AcceptGaps = []string{"no-setsockopt-hook"}
	must(t, Preflight(cfg), "preflight")
	d, err := Open(t.Context(), cfg)
	must(t, err, "open")
	t.Cleanup(func() { must(t, d.Close(), "close") })
	s := d.Status()
	means := "setsockopt hook missing: a process with CAP_NET_RAW can send past the judge"
	if !s.Healthy || !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.HasPrefix(w, "accepted gap no-setsockopt-hook: "+means) }) {
		t.Errorf("healthy %v, warnings %q", s.Healthy, s.Warnings)
	}
	for _, h := range s.Hooks {
		if (h.Name == "setsockopt") != (h.Error != "") || h.Name == "setsockopt" && (h.Attached || !strings.HasPrefix(h.Error, means)) {
			t.Errorf("hook %+v", h)
		}
	}
	var told []string
	d.repairHooks(func(s string) { told = append(told, s) })
	if len(told) > 0 {
		t.Errorf("what cannot be repaired was told: %q", told)
	}
}

// TestNamespaceRoot: a directory that somebody chose is no surprise, and neither is the machine's root.
func TestNamespaceRoot(t *testing.T) {
	dir := newCgroup(t)
	if is, err := namespaceRoot(dir); err != nil || is {
		t.Errorf("a chosen directory: %v, %v", is, err)
	}
	must(t, unix.Unshare(unix.CLONE_NEWNS), "new mount namespace")
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), "private mounts")
	at := t.TempDir()
	must(t, unix.Mount(dir, at, "", unix.MS_BIND, ""), "mount")
	defer func() { must(t, unix.Unmount(at, unix.MNT_DETACH), "unmount") }()
	if is, err := namespaceRoot(at); err != nil || !is {
		t.Errorf("the root of a smaller tree: %v, %v", is, err)
	}
	if _, err := namespaceRoot(filepath.Join(at, "gone")); err == nil {
		t.Error("what is not there has an answer")
	}
}
