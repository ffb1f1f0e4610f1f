// Package attest finds out which cgroups of this host belong to which workload.
//
// It resolves the selectors of the host's own workloads (cgroup: unit: uid:) below the cgroup root to what the kernel
// compares: the id of a cgroup, which is the inode of its directory, and a user. A process says nothing about itself
// here: only root can make the directories that selectors name. It does not judge: which packets a match lets through
// is policy.
//
// Start at Resolve, which is one look; Watcher looks again whenever the tree changes (watch.go). Where the tree is
// found is root.go.
package attest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// unitSlice is where systemd puts system services. A directory of the unit's name elsewhere is never the unit: below
// a user's slice, or delegated to a container, others may make one.
const unitSlice = "/system.slice/"

// Match is what one workload's selectors found.
type Match struct {
	Key  policy.LocalKey
	Path string // below the cgroup root; "/" where only a user is named
	Why  string // why nothing matches; empty when Key counts
}

// Matched reports whether the workload has a cgroup now.
func (m Match) Matched() bool { return m.Why == "" }

// Result is one look at the host.
type Result struct {
	Locals   map[policy.LocalKey]identity.Number
	Matches  map[identity.Number]Match
	Warnings []string
}

// Equal reports whether two looks found the same.
func (r Result) Equal(o Result) bool {
	return maps.Equal(r.Locals, o.Locals) && maps.Equal(r.Matches, o.Matches) && slices.Equal(r.Warnings, o.Warnings)
}

// target is what a workload's selectors name, before looking: one directory and one user.
type target struct {
	path  string   // "/" for the whole tree
	units []string // directories that must belong to root; path is one of them or lies below
	uid   uint32
}

// Resolve looks once. In order:
//
//  1. all selectors of a workload are joined to one directory and one user; what cannot hold together matches nothing;
//  2. the directory must exist below root, and a unit's must belong to uid 0;
//  3. what two workloads claim goes to neither.
func Resolve(root string, workloads []mesh.Workload) Result {
	res := Result{Locals: map[policy.LocalKey]identity.Number{}, Matches: map[identity.Number]Match{}}
	claims := map[policy.LocalKey][]mesh.Workload{}
	for _, w := range workloads {
		m := resolveOne(root, w)
		res.Matches[w.Number] = m
		if m.Matched() {
			claims[m.Key] = append(claims[m.Key], w)
		}
	}
	for key, ws := range claims {
		if len(ws) == 1 {
			res.Locals[key] = ws[0].Number
			continue
		}
		// 3.
		names := make([]string, len(ws))
		for i, w := range ws {
			names[i] = w.ID.Short()
		}
		slices.Sort(names)
		why := "the same processes match " + strings.Join(names, " and ") + ", so they get no identity: make the selectors differ"
		res.Warnings = append(res.Warnings, why)
		for _, w := range ws {
			m := res.Matches[w.Number]
			m.Why = why
			res.Matches[w.Number] = m
		}
	}
	res.Warnings = append(res.Warnings, overlaps(workloads, res.Matches)...)
	slices.Sort(res.Warnings)
	return res
}

func resolveOne(root string, w mesh.Workload) Match {
	// 1.
	t, err := join(w.Selectors)
	if err != nil {
		return Match{Why: err.Error()}
	}
	// 2.
	for _, unit := range t.units {
		_, owner, err := lookup(root, unit)
		if err == nil && owner != 0 {
			return Match{Path: t.path, Why: fmt.Sprintf("cgroup %s belongs to uid %d, so it is not a unit of the system", unit, owner)}
		}
	}
	id, _, err := lookup(root, t.path)
	switch {
	case errors.Is(err, unix.ENOENT):
		return Match{Path: t.path, Why: "no cgroup " + t.path + " exists: the service is not running"}
	case err != nil:
		return Match{Path: t.path, Why: fmt.Sprintf("cgroup %s cannot be looked at: %v", t.path, err)}
	}
	return Match{Key: policy.LocalKey{Cgroup: id, UID: t.uid}, Path: t.path}
}

var errNever = errors.New("no process can match")

// join finds the one directory that all selectors allow: the innermost, when each lies in the one before.
func join(selectors []policy.Selector) (target, error) {
	t := target{path: "/", uid: policy.AnyUID}
	if len(selectors) == 0 {
		return t, fmt.Errorf("%w: there is no selector", errNever)
	}
	for _, s := range selectors {
		switch s.Kind {
		case policy.SelectCgroup, policy.SelectUnit:
			path := s.Value
			if s.Kind == policy.SelectUnit {
				path = unitSlice + s.Value
				t.units = append(t.units, path)
			}
			switch {
			case within(path, t.path):
				t.path = path
			case !within(t.path, path):
				return t, fmt.Errorf("%w: it would have to be in %s and in %s", errNever, t.path, path)
			}
		case policy.SelectUID:
			n, err := strconv.ParseUint(s.Value, 10, 32)
			if err != nil || t.uid != policy.AnyUID && t.uid != uint32(n) {
				return t, fmt.Errorf("%w: it would have to run as two users", errNever)
			}
			t.uid = uint32(n)
		default:
			return t, fmt.Errorf("selector %v is %w", s, policy.ErrNotBuilt)
		}
	}
	return t, nil
}

// within reports whether path is dir or lies below it.
func within(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// lookup finds a cgroup's id and owner. No component may be a symbolic link or another mount: the tree of cgroups has
// neither, so one would be somebody's trap.
func lookup(root, path string) (id uint64, uid uint32, err error) {
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("open cgroup root %s: %w", root, err)
	}
	defer unix.Close(top)
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
	fd, err := unix.Openat2(top, "."+path, &how)
	if err != nil {
		return 0, 0, fmt.Errorf("open cgroup: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, 0, fmt.Errorf("look at cgroup: %w", err)
	}
	return st.Ino, st.Uid, nil
}

// overlaps warns of workloads whose processes would match another one too: the judge gives those no identity.
func overlaps(workloads []mesh.Workload, matches map[identity.Number]Match) []string {
	var out []string
	for _, in := range workloads {
		a := matches[in.Number]
		if !a.Matched() {
			continue
		}
		for _, outer := range workloads {
			b := matches[outer.Number]
			if !b.Matched() || a.Path == b.Path && a.Key == b.Key || !within(a.Path, b.Path) || a.Path == b.Path && in.Number > outer.Number {
				continue
			}
			if a.Key.UID == b.Key.UID || a.Key.UID == policy.AnyUID || b.Key.UID == policy.AnyUID {
				out = append(out, fmt.Sprintf("processes in cgroup %s can match %s and %s; those that match both get no identity", a.Path, in.ID.Short(), outer.ID.Short()))
			}
		}
	}
	return out
}
