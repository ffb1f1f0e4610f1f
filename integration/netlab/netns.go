package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// netnsDir is where "ip netns" and nsenter look for named namespaces.
const netnsDir = "/run/netns"

// space is one named network namespace.
type space struct {
	path  string
	fd    int    // keeps the namespace open; -1 when only the name is known
	inode uint64 // of the namespace, to recognise it behind other file descriptors
}

// newSpace makes a namespace and gives it a name below netnsDir.
func newSpace(name string) (*space, error) {
	if err := shareNetnsDir(); err != nil {
		return nil, fmt.Errorf("prepare %s: %w", netnsDir, err)
	}
	path := filepath.Join(netnsDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	s := &space{path: path, fd: -1}
	if err := bindNewNamespace(path); err != nil {
		return nil, errors.Join(fmt.Errorf("make namespace %s: %w", name, err), s.remove())
	}
	if s.fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		s.inode, err = inodeOf(s.fd)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open namespace %s: %w", name, err), s.remove())
	}
	return s, nil
}

// shareNetnsDir makes netnsDir a shared mount in the way "ip netns add" does. Without it, a later "ip netns add" would
// mount the directory over itself with a copy of every namespace in it, and those copies could not be removed any more.
func shareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	dir, err := unix.Open(netnsDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	// "ip netns" takes the same lock around the same two steps.
	if err := unix.Flock(dir, unix.LOCK_EX); err != nil {
		return err
	}
	share := func() error { return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err = share()
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return share()
}

// bindNewNamespace takes the calling thread through a new namespace, just long enough to hang its name on path.
func bindNewNamespace(path string) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
	})
}

// do runs f on a thread that is inside the namespace.
func (s *space) do(fd int, f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", s.path, err)
		}
		return f()
	})
}

// onOwnThread runs f on a locked thread and afterwards brings the thread back to the namespace it came from, whatever f did
// to it and however f ended. Calls may be nested.
func onOwnThread(f func() error) error {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		err := unix.Setns(home, unix.CLONE_NEWNET)
		unix.Close(home)
		if err != nil {
			// A thread in the wrong namespace that went on to other goroutines would corrupt them silently.
			panic(fmt.Sprintf("netlab: internal error: thread cannot return to its namespace: %v", err))
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

// remove takes the name away; the kernel frees the namespace when nobody is inside any more. A name that is not there is
// success.
func (s *space) remove() error {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
	if err := unix.Unmount(s.path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", s.path, err)
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func inodeOf(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}
