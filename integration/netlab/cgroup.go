package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup2Mount finds where cgroup v2 is mounted: at /sys/fs/cgroup, or at /sys/fs/cgroup/unified beside version 1.
func cgroup2Mount() (string, error) {
	mounts, err := readMounts()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.fstype == "cgroup2" {
			return m.point, nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted")
}

// killCgroup sends SIGKILL to every process in dir and below, and waits until none is left. The kernel does it in one step
// from 5.14 on, so that nothing can fork its way out.
func killCgroup(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		if _, statErr := os.Stat(dir); errors.Is(statErr, os.ErrNotExist) {
			return nil
		}
		err = killEach(dir)
	}
	if err != nil {
		return fmt.Errorf("kill processes in %s: %w", dir, err)
	}
	if err := waitEmpty(dir, killWait); err != nil {
		return fmt.Errorf("wait for processes in %s: %w", dir, err)
	}
	return nil
}

// killEach is for kernels without cgroup.kill.
func killEach(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		for _, pid := range cgroupProcs(path) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		return nil
	})
}

func cgroupProcs(dir string) []int {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var pids []int
	for _, field := range strings.Fields(string(text)) {
		// 0 stands for a process of another pid namespace; a signal to it would go to our own group.
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// waitEmpty waits until the subtree has no live process. The kernel marks every change of cgroup.events with POLLPRI.
func waitEmpty(dir string, limit time.Duration) error {
	fd, err := unix.Open(filepath.Join(dir, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 256)
	for deadline := time.Now().Add(limit); ; {
		n, err := unix.Pread(fd, buf, 0)
		if err != nil {
			return err
		}
		if bytes.Contains(buf[:n], []byte("populated 0")) {
			return nil
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("processes %v are still there after %v", livePIDs(dir), limit)
		}
		// The short time-out also covers a change between the read and the poll.
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func livePIDs(dir string) []int {
	var pids []int
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			pids = append(pids, cgroupProcs(path)...)
		}
		return nil
	})
	return pids
}

// removeCgroup removes dir and everything below it, deepest first. A subtree that is not there is success.
func removeCgroup(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), killWait)
	defer cancel()
	for {
		err := removeCgroupOnce(dir)
		if !errors.Is(err, unix.EBUSY) || ctx.Err() != nil {
			return err
		}
		// A task that has just died can hold its cgroup for a moment more.
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func removeCgroupOnce(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := unix.Rmdir(dirs[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
		}
	}
	return nil
}
