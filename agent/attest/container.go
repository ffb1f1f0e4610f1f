package attest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/link"
)

const (
	// maxDirs bounds the cgroups that are looked through for containers; beyond it a warning says so.
	maxDirs = 16384
	// maxDepth bounds how deep below the root a container is looked for.
	maxDepth = 16
	// maxContainers bounds the containers of a host; beyond it a warning says so.
	maxContainers = 2048
	// maxInside bounds the cgroups below one container that are searched for its first process.
	maxInside = 256
	// idLength is that of the ids that Docker, Podman, CRI-O and Kubernetes' containerd give: 256 bits in hex.
	idLength = 64
)

// container is one that runs, as its cgroup and its runtime tell.
type container struct {
	path   string // of its cgroup below the root
	id     string
	by     runtime
	cgroup uint64

	labels map[string]string
	why    string // why the rest is not known; empty when it is
	space  space
	numb   int // the space's number here (link.SpaceOf); link.NoSpace for none
}

// space is a network namespace; comparable.
type space struct{ dev, ino uint64 }

// scan finds the containers below root by the names of their cgroups. A container's own cgroups are not looked into, so
// that it cannot pass for another one, and neither are directories that others than root could make.
//
// dirs are the directories that were looked into: what comes and goes in them can change the answer.
func scan(root string) (found []container, dirs []string, full bool) {
	todo := []string{"/"}
	for len(todo) > 0 {
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		fd, err := openCgroup(root, at, unix.O_RDONLY)
		if err != nil {
			continue // gone since
		}
		if _, uid, err := owner(fd); err != nil || uid != 0 && at != "/" {
			_ = unix.Close(fd)
			continue
		}
		names, whole := subdirs(fd)
		full = full || !whole
		dirs = append(dirs, at)
		for _, name := range names {
			sub := path.Join(at, name)
			by, id := runtimeOf(sub)
			switch {
			case by != "" && len(found) < maxContainers:
				if cgroup, uid, err := lookup(root, sub); err == nil && uid == 0 {
					found = append(found, container{path: sub, id: id, by: by, cgroup: cgroup})
				}
			case by == "" && strings.Count(sub, "/") < maxDepth && len(dirs)+len(todo) < maxDirs:
				todo = append(todo, sub)
			default:
				full = true
			}
		}
	}
	slices.SortFunc(found, func(a, b container) int { return strings.Compare(a.path, b.path) })
	return found, dirs, full
}

// subdirs lists the directories in an open directory, and closes it. Names that could break a line of a message are none that a
// runtime gives, and are left out.
func subdirs(fd int) (names []string, whole bool) {
	f := os.NewFile(uintptr(fd), "cgroup")
	defer f.Close()
	for {
		entries, err := f.ReadDir(512)
		for _, e := range entries {
			if e.IsDir() && !strings.ContainsFunc(e.Name(), func(r rune) bool { return r < ' ' || r == 0x7f }) {
				names = append(names, e.Name())
			}
		}
		if err != nil {
			return names, errors.Is(err, io.EOF)
		}
		if len(names) > maxDirs {
			return names[:maxDirs], false
		}
	}
}

// runtimeOf reads a cgroup's path: who made it for which container, or "".
func runtimeOf(p string) (by runtime, id string) {
	name := path.Base(p)
	for _, form := range []struct {
		prefix, suffix string
		by             runtime
	}{
		{"docker-", ".scope", docker}, {"cri-containerd-", ".scope", containerd}, {"nerdctl-", ".scope", containerd},
		{"libpod-payload-", "", podman}, {"libpod-", ".scope", podman}, {"libpod-", "", podman}, {"crio-", ".scope", podman}, {"crio-", "", podman},
	} {
		rest, ok := strings.CutPrefix(name, form.prefix)
		if id, suffix := strings.CutSuffix(rest, form.suffix); ok && suffix && isID(id) {
			return form.by, id
		}
	}
	switch dir := path.Dir(p); {
	case !isID(name):
		return "", ""
	case path.Base(dir) == "docker":
		return docker, name
	case strings.HasPrefix(dir, "/kubepods"):
		return kubernetes, name
	}
	return "", ""
}

func isID(s string) bool {
	return len(s) == idLength && strings.Trim(s, "0123456789abcdef") == ""
}

// identify fills in what the runtime says. The first process that it names must be in the container's cgroup, which ties
// the labels to the cgroup: whoever could make a directory of this name cannot put that process there. fd is open on the
// process's network namespace afterwards; -1 with an error, and then the space is that of some process, if there is one.
func (c *container) identify(root string, r Runtimes) (fd int, err error) {
	rec, err := r.read(c.by, c.id)
	if err == nil {
		fd, err = c.enter(root, rec.pid)
	}
	if err == nil {
		c.labels = rec.labels
		return fd, nil
	}
	if all := processes(root, c.path); len(all) > 0 {
		if pid, perr := strconv.Atoi(all[0]); perr == nil {
			if fd, perr := c.enter(root, pid); perr == nil {
				_ = unix.Close(fd)
			}
		}
	}
	return -1, err
}

// enter opens the network namespace of one of the container's processes and notes which it is.
func (c *container) enter(root string, pid int) (fd int, err error) {
	fd, err = unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("look at its process %d: %w", pid, err)
	}
	// After the namespace was opened: should the number have been another process's, that one is in the cgroup too.
	if !slices.Contains(processes(root, c.path), strconv.Itoa(pid)) {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("%w: its process %d is not in its cgroup", errState, pid)
	}
	if c.space, err = spaceOf(fd); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// processes lists those in a cgroup and below it: runtimes put them into "init", "container" or the like.
func processes(root, dir string) (all []string) {
	todo := []string{dir}
	for n := 0; len(todo) > 0 && n < maxInside; n++ {
		at := todo[0]
		todo = todo[1:]
		fd, err := openCgroup(root, at, unix.O_RDONLY)
		if err != nil {
			continue
		}
		all = append(all, listed(fd)...)
		names, _ := subdirs(fd)
		for _, name := range names[:min(len(names), maxInside)] {
			todo = append(todo, path.Join(at, name))
		}
	}
	return all
}

func listed(dir int) []string {
	fd, err := unix.Openat(dir, "cgroup.procs", unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), "cgroup.procs")
	defer f.Close()
	data, _ := io.ReadAll(io.LimitReader(f, maxState)) // a cgroup that is removed meanwhile has no processes
	return strings.Fields(string(data))
}

func spaceOf(fd int) (space, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return space{}, fmt.Errorf("look at a network namespace: %w", err)
	}
	return space{st.Dev, st.Ino}, nil
}

// homeSpace is the agent's own: that of the calling thread, as everywhere in dataplane/link.
func homeSpace() (space, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return space{}, fmt.Errorf("look at this network namespace: %w", err)
	}
	return space{st.Dev, st.Ino}, nil
}

// has reports whether the container's labels are these.
func (c *container) has(want []string) bool {
	if c.why != "" {
		return false
	}
	for _, w := range want {
		k, v, _ := strings.Cut(w, "=")
		if have, ok := c.labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// short names a container as people and runtimes do.
func (c *container) short() string { return c.id[:12] }

// number finds the spaces' numbers. It lists the devices first, which gives numbers out, and the spaces are open.
func number(containers []container, fds []int, home space) (legs []link.Leg, err error) {
	if legs, err = link.Legs(); err != nil {
		return nil, err //nolint:wrapcheck // says what was looked for
	}
	for i := range containers {
		c := &containers[i]
		c.numb = link.NoSpace
		if fds[i] < 0 || c.space == home {
			continue
		}
		if c.numb, err = link.SpaceOf(fds[i]); err != nil {
			c.why = err.Error()
		}
	}
	return legs, nil
}
