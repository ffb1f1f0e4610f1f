// Package attest finds out which cgroups and network devices of this host belong to which workload.
//
// It resolves the selectors of the host's own workloads (cgroup: unit: uid: container: interface:) to what the kernel
// compares: the id of a cgroup, which is the inode of its directory, a user, and the index of a network device that leads
// into a workload's own network namespace. A process says nothing about itself here: only root can make the directories
// that selectors name, the labels of containers are read from files that only root can write, and a device is believed
// only where the kernel says that it leads elsewhere. It does not judge: which packets a match lets through is policy.
//
// Start at Resolver.Resolve, which is one look; Watcher looks again whenever something changes (watch.go). Containers are
// found in container.go, what their runtimes say of them is read in runtime.go, devices are in device.go. Where the tree
// is found is root.go.
package attest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// unitSlice is where systemd puts system services. A directory of the unit's name elsewhere is never the unit: below
// a user's slice, or delegated to a container, others may make one.
const unitSlice = "/system.slice/"

// Host is where a Resolver looks.
type Host struct {
	Root     string // directory of the cgroup v2 root, or of a subtree
	Tunnel   string // name of the tunnel device, which leads to no workload
	Runtimes Runtimes
}

// Match is what one workload's selectors found.
type Match struct {
	Key    policy.LocalKey // of the first cgroup; zero where only a device is named
	Path   string          // of the cgroups below the root, one a line; "/" where only a user is named, "" where only a device is
	Device string          // that leads to the workload's own network namespace; "" where it has none
	Why    string          // why nothing matches; empty when Key or Device counts
}

// Matched reports whether the workload has a cgroup or a device now.
func (m Match) Matched() bool { return m.Why == "" }

// Cgroups are the paths of the cgroups that matched.
func (m Match) Cgroups() []string {
	if m.Path == "" {
		return nil
	}
	return strings.Split(m.Path, "\n")
}

// Result is one look at the host.
type Result struct {
	// Look grows with every look of one Resolver: of two results, that with the greater one is true.
	Look   uint64
	Locals map[policy.LocalKey]identity.Number
	// Interfaces ties network devices of this host, by index, to the workload behind each.
	Interfaces map[uint32]identity.Number
	Matches    map[identity.Number]Match
	Warnings   []string
}

// Equal reports whether two looks found the same.
func (r Result) Equal(o Result) bool {
	return maps.Equal(r.Locals, o.Locals) && maps.Equal(r.Interfaces, o.Interfaces) && maps.Equal(r.Matches, o.Matches) && slices.Equal(r.Warnings, o.Warnings)
}

// target is what a workload's selectors name, before looking: one directory and one user, and perhaps containers in it;
// or one network device.
type target struct {
	path   string   // "/" for the whole tree
	units  []string // directories that must belong to root; path is one of them or lies below
	uid    uint32
	labels []string // KEY=VALUE of containers, all of them
	device string
}

// claim is one thing of the host that can belong to one workload: a cgroup with a user, or a device.
type claim struct {
	key    policy.LocalKey
	device uint32
}

// found is a Match with all that it stands for.
type found struct {
	Match
	keys  []policy.LocalKey
	index uint32 // of the device; 0 for none
}

func (f found) claims() []claim {
	var out []claim
	for _, k := range f.keys {
		out = append(out, claim{key: k})
	}
	if f.index != 0 {
		out = append(out, claim{device: f.index})
	}
	return out
}

// Resolver looks at one host. Its methods may be called by several goroutines.
type Resolver struct {
	host  Host
	mu    sync.Mutex // one look at a time
	looks uint64
}

// NewResolver looks at a host.
func NewResolver(h Host) *Resolver { return &Resolver{host: h} }

// Resolve looks once, in the network namespace of the calling thread. In order:
//
//  1. all selectors of a workload are joined to one directory, one user and labels, or to one device; what cannot hold
//     together matches nothing;
//  2. the directory must exist below root, and a unit's must belong to uid 0; containers must run in it; a device must
//     lead into another network namespace;
//  3. what two workloads claim goes to neither.
func (r *Resolver) Resolve(workloads []mesh.Workload) Result {
	res, _ := r.resolve(func() []mesh.Workload { return workloads })
	return res
}

// resolve also returns the directories of cgroups whose content mattered. What is looked for is asked under the lock, so
// that no later look is for earlier workloads.
func (r *Resolver) resolve(wanted func() []mesh.Workload) (Result, []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	workloads := wanted()
	r.looks++
	l := newLook(r.host)
	defer l.close()
	res := Result{Look: r.looks, Locals: map[policy.LocalKey]identity.Number{}, Interfaces: map[uint32]identity.Number{}, Matches: map[identity.Number]Match{}}
	all := map[identity.Number]found{}
	claims := map[claim][]mesh.Workload{}
	for _, w := range workloads {
		f := l.one(w)
		all[w.Number] = f
		if !f.Matched() {
			continue
		}
		for _, c := range f.claims() {
			claims[c] = append(claims[c], w)
		}
	}
	// 3.
	for c, ws := range claims {
		if len(ws) == 1 {
			continue
		}
		why := contested(c, all[ws[0].Number].Device, ws)
		res.Warnings = append(res.Warnings, why)
		for _, w := range ws {
			f := all[w.Number]
			f.Why = why
			all[w.Number] = f
		}
	}
	for n, f := range all {
		res.Matches[n] = f.Match
		if !f.Matched() {
			continue
		}
		for _, k := range f.keys {
			res.Locals[k] = n
		}
		if f.index != 0 {
			res.Interfaces[f.index] = n
		}
	}
	res.Warnings = append(append(res.Warnings, l.warnings...), overlaps(workloads, res.Matches)...)
	slices.Sort(res.Warnings)
	res.Warnings = slices.Compact(res.Warnings)
	return res, l.dirs
}

func contested(c claim, device string, ws []mesh.Workload) string {
	names := make([]string, len(ws))
	for i, w := range ws {
		names[i] = w.ID.Short()
	}
	slices.Sort(names)
	if c.device != 0 {
		return "device " + device + " leads to " + strings.Join(names, " and ") + ", so neither gets what arrives from it: make the selectors differ"
	}
	return "the same processes match " + strings.Join(names, " and ") + ", so they get no identity: make the selectors differ"
}

// one is steps 1 and 2.
func (l *look) one(w mesh.Workload) found {
	// 1.
	t, err := join(w.Selectors)
	if err != nil {
		return unmatched("", err.Error())
	}
	// 2.
	if t.device != "" {
		return l.device(t.device, w)
	}
	for _, unit := range t.units {
		_, owner, err := lookup(l.host.Root, unit)
		if err == nil && owner != 0 {
			return unmatched(t.path, fmt.Sprintf("cgroup %s belongs to uid %d, so it is not a unit of the system", unit, owner))
		}
	}
	if len(t.labels) > 0 {
		return l.containers(t)
	}
	id, _, err := lookup(l.host.Root, t.path)
	switch {
	case errors.Is(err, unix.ENOENT):
		return unmatched(t.path, "no cgroup "+t.path+" exists: the service is not running")
	case err != nil:
		return unmatched(t.path, fmt.Sprintf("cgroup %s cannot be looked at: %v", t.path, err))
	}
	key := policy.LocalKey{Cgroup: id, UID: t.uid}
	return found{Match: Match{Key: key, Path: t.path}, keys: []policy.LocalKey{key}}
}

func unmatched(path, why string) found { return found{Match: Match{Path: path, Why: why}} }

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
		case policy.SelectContainer:
			t.labels = append(t.labels, s.Value)
		case policy.SelectInterface:
			if len(selectors) > 1 {
				return t, fmt.Errorf("%w: what arrives from a network device has no other selector", errNever)
			}
			t.device = s.Value
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

// lookup finds a cgroup's id and owner.
func lookup(root, path string) (id uint64, uid uint32, err error) {
	fd, err := openCgroup(root, path, unix.O_PATH)
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(fd)
	return owner(fd)
}

// openCgroup opens a cgroup's directory. No component may be a symbolic link or another mount: the tree of cgroups has
// neither, so one would be somebody's trap.
func openCgroup(root, path string, flags uint64) (int, error) {
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open cgroup root %s: %w", root, err)
	}
	defer unix.Close(top)
	how := unix.OpenHow{Flags: flags | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
	fd, err := unix.Openat2(top, "."+path, &how)
	if err != nil {
		return -1, fmt.Errorf("open cgroup: %w", err)
	}
	return fd, nil
}

func owner(fd int) (id uint64, uid uint32, err error) {
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
		for _, outer := range workloads {
			a, b := matches[in.Number], matches[outer.Number]
			if in.Number == outer.Number || !a.Matched() || !b.Matched() {
				continue
			}
			if a.Key.UID != b.Key.UID && a.Key.UID != policy.AnyUID && b.Key.UID != policy.AnyUID {
				continue
			}
			for _, p := range a.Cgroups() {
				if slices.ContainsFunc(b.Cgroups(), func(q string) bool { return within(p, q) && (p != q || in.Number < outer.Number) }) {
					out = append(out, fmt.Sprintf("processes in cgroup %s can match %s and %s; those that match both get no identity", p, in.ID.Short(), outer.ID.Short()))
				}
			}
		}
	}
	return out
}
