package attest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNoCgroup2 is returned on hosts without a cgroup v2 mount.
var ErrNoCgroup2 = errors.New("no cgroup v2 file system is mounted: boot with systemd.unified_cgroup_hierarchy=1, or mount it and set cgroup_root")

// FindRoot returns where cgroup v2 is mounted, and whether that is the whole tree: inside a container, or under a bind
// mount, only a part of it can be seen. Hybrid hosts have it below /sys/fs/cgroup/unified.
func FindRoot() (path string, whole bool, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", false, fmt.Errorf("find cgroup root: %w", err)
	}
	defer f.Close()
	return findRoot(f, isCgroup2)
}

// isCgroup2 is false for a mount that another mount hides.
func isCgroup2(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// findRoot reads mountinfo (proc_pid_mountinfo(5)). Of several visible mounts one that shows the whole tree counts
// first, then the shortest path.
func findRoot(r io.Reader, visible func(path string) bool) (best string, whole bool, err error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		fields := strings.Fields(before)
		if !ok || len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		path, all := unescape(fields[4]), fields[3] == "/"
		if better := best == "" || all && !whole || all == whole && len(path) < len(best); better && visible(path) {
			best, whole = path, all
		}
	}
	if err := sc.Err(); err != nil {
		return "", false, fmt.Errorf("read mountinfo: %w", err)
	}
	if best == "" {
		return "", false, ErrNoCgroup2
	}
	return best, whole, nil
}

// unescape turns \040 and its like back into bytes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

const (
	fileIDKernfs = 0xfe // FILEID_KERNFS, include/linux/exportfs.h
	maxPaths     = 1024 // remembered; when full, all are forgotten
)

// Paths names cgroups by their id, for records. It is safe for use by several goroutines.
type Paths struct {
	root string

	mu    sync.Mutex
	known map[uint64]string
}

// NewPaths names cgroups below root.
func NewPaths(root string) *Paths { return &Paths{root: root, known: map[uint64]string{}} }

// Path returns the cgroup's path below the root, or "" when it is gone or unknown.
func (p *Paths) Path(id uint64) string {
	if id == 0 {
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if path, ok := p.known[id]; ok {
		return path
	}
	path := pathOf(p.root, id)
	if len(p.known) >= maxPaths {
		clear(p.known)
	}
	p.known[id] = path
	return path
}

// Unit returns the systemd unit that a cgroup belongs to, or "".
func (p *Paths) Unit(id uint64) string { return unitOf(p.Path(id)) }

func unitOf(path string) string {
	parts := strings.Split(path, "/")
	for i := len(parts) - 1; i >= 0; i-- {
		if strings.HasSuffix(parts[i], ".service") || strings.HasSuffix(parts[i], ".scope") {
			return parts[i]
		}
	}
	return ""
}

// pathOf asks the kernel for the directory with this inode.
func pathOf(root string, id uint64) string {
	top, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(top)
	var raw [8]byte
	binary.NativeEndian.PutUint64(raw[:], id)
	fd, err := unix.OpenByHandleAt(top, unix.NewFileHandle(fileIDKernfs, raw[:]), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil || !within(path, root) {
		return ""
	}
	return "/" + strings.Trim(strings.TrimPrefix(path, root), "/")
}
