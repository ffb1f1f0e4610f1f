package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// siocgskns asks a socket for its network namespace (linux/sockios.h); it needs CAP_NET_ADMIN.
const siocgskns = 0x894c

// Leaks lists what is on the machine under this prefix: namespaces, mounts, cgroups, and links in the caller's namespace.
// For a prefix that no running lab holds, all of it was left behind.
func Leaks(prefix string) ([]string, error) {
	var out []string
	names, err := filepath.Glob(filepath.Join(netnsDir, prefix+"-*"))
	if err != nil {
		return nil, err
	}
	for _, path := range names {
		out = append(out, "namespace "+path)
	}
	mounts, err := readMounts()
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	for _, m := range mounts {
		if m.source == bpffsSource(prefix) || strings.HasPrefix(m.point, filepath.Join(netnsDir, prefix+"-")) {
			out = append(out, "mount "+m.point)
		}
		if m.fstype != "cgroup2" {
			continue
		}
		dir := filepath.Join(m.point, prefix)
		if _, err := os.Stat(dir); err == nil {
			out = append(out, fmt.Sprintf("cgroup %s, processes %v", dir, livePIDs(dir)))
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Alias, linkAlias(prefix, "")) {
			out = append(out, "link "+link.Attrs().Name)
		}
	}
	return out, nil
}

// linkAlias marks the links of a lab, whose names are too short to carry the prefix.
func linkAlias(prefix, what string) string { return "netlab-" + prefix + " " + what }

// stillInside names processes, and threads and sockets of this process, that keep one of the namespaces alive after the
// lab's own processes have gone.
func stillInside(spaces map[string]*space) error {
	inodes := map[uint64]string{}
	for name, s := range spaces {
		if s.inode != 0 {
			inodes[s.inode] = name
		}
	}
	for deadline := time.Now().Add(releaseWait); ; {
		err := errors.Join(processesInside(inodes), socketsInside(inodes))
		if err == nil || !time.Now().Before(deadline) {
			return err
		}
		<-time.After(10 * time.Millisecond)
	}
}

func processesInside(inodes map[uint64]string) error {
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return err
	}
	own, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range append(links, own...) {
		// A process that ends while it is looked at is no leak.
		if target, err := os.Readlink(link); err == nil {
			if name, ok := inodes[namespaceInode(target)]; ok {
				errs = append(errs, fmt.Errorf("%s is inside %s", strings.TrimSuffix(link, "/ns/net"), name))
			}
		}
	}
	return errors.Join(errs...)
}

// namespaceInode reads the number out of "net:[4026531840]".
func namespaceInode(target string) uint64 {
	text, ok := strings.CutPrefix(strings.TrimSuffix(target, "]"), "net:[")
	if !ok {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// socketsInside asks the kernel for the namespace of every socket that this process has open.
func socketsInside(inodes map[uint64]string) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err != nil || !strings.HasPrefix(target, "socket:") {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		ns, err := unix.IoctlRetInt(fd, siocgskns)
		if err != nil {
			continue
		}
		inode, err := inodeOf(ns)
		unix.Close(ns)
		if err != nil {
			continue
		}
		if name, ok := inodes[inode]; ok {
			errs = append(errs, fmt.Errorf("this process still has %s (descriptor %d) open inside %s", target, fd, name))
		}
	}
	return errors.Join(errs...)
}
