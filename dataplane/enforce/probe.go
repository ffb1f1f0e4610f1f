package enforce

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The refusals that callers tell apart.
var (
	// ErrOldKernel: nothing below 5.10 has what the judge needs.
	ErrOldKernel = errors.New("kernel is too old: Signet needs Linux 5.10 or later")
	// ErrNoTCX: the kernel (below 6.6) cannot attach to devices by tcx, and there are no Filters.
	ErrNoTCX = errors.New("kernel has no tcx (Linux 6.6), and no clsact filters can be used in its place")
	// ErrNoHook: the kernel lacks a hook, and what that means was not accepted.
	ErrNoHook = errors.New("kernel lacks a hook")
	// ErrPermission: this process may not load or attach programs.
	ErrPermission = errors.New("the kernel does not let this process use BPF: it needs CAP_BPF and CAP_NET_ADMIN (and CAP_SYS_ADMIN below Linux 5.8); run signetd as root or give its unit these capabilities")
	// ErrNoBPFFS: the pin directory is not on a bpffs.
	ErrNoBPFFS = errors.New("directory is not on a BPF file system")
	// ErrNoCgroup: the cgroup root is not a cgroup v2 directory.
	ErrNoCgroup = errors.New("not a cgroup v2 directory")
	// ErrForeignPins: what is pinned has another layout under the same ABI version.
	ErrForeignPins = errors.New("pinned maps do not fit this version")
)

// explain turns the kernel's refusals into something that an operator can act on.
func explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES) && !errors.As(err, new(*ebpf.VerifierError)):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return fmt.Errorf("%w: %w; signet down --release removes them", ErrForeignPins, err)
	}
	return err
}

// kernelVersion reads the running kernel's major and minor number.
func kernelVersion() (major, minor int, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return 0, 0, fmt.Errorf("read the kernel's version: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return 0, 0, fmt.Errorf("read the kernel's version %q: %w", release, err)
	}
	return major, minor, nil
}

// checkKernel refuses kernels by name.
func checkKernel(major, minor int) error {
	if major < 5 || major == 5 && minor < 10 {
		return fmt.Errorf("%w; this is %d.%d", ErrOldKernel, major, minor)
	}
	return nil
}

// checkCgroup makes sure that dir is a cgroup v2 directory, and returns its id.
func checkCgroup(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("cgroup root %s: %w", dir, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("cgroup root %s: %w; on a hybrid host try /sys/fs/cgroup/unified", dir, ErrNoCgroup)
	}
	return CgroupID(dir)
}

// CgroupID is the kernel's id of a cgroup v2 directory: what LocalKey.Cgroup compares.
func CgroupID(dir string) (uint64, error) {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0)
	if err != nil {
		return 0, fmt.Errorf("id of cgroup %s: %w", dir, err)
	}
	var id uint64
	if b := handle.Bytes(); len(b) == 8 {
		for i := range b {
			id |= uint64(b[i]) << (8 * i)
		}
		return id, nil
	}
	return 0, fmt.Errorf("id of cgroup %s: %w", dir, ErrNoCgroup)
}

// defaultBPFFS is where the system expects bpffs.
const defaultBPFFS = "/sys/fs/bpf"

// MountBPFFS makes sure that dir is on a bpffs. Where /sys/fs/bpf is not mounted yet, and dir is it or below it, it is
// mounted; a mount anywhere else is the operator's business.
func MountBPFFS(dir string) error {
	ok, err := onBPFFS(dir)
	if err != nil || ok {
		return err
	}
	clean := filepath.Clean(dir)
	if clean != defaultBPFFS && !strings.HasPrefix(clean, defaultBPFFS+"/") {
		return fmt.Errorf("%s: %w: use a directory below %s, or run: mount -t bpf bpf %s", dir, ErrNoBPFFS, defaultBPFFS, dir)
	}
	if err := unix.Mount("bpf", defaultBPFFS, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return explain(fmt.Errorf("mount bpffs at %s: %w", defaultBPFFS, err))
	}
	return nil
}

// onBPFFS looks at dir, or at its nearest parent that exists.
func onBPFFS(dir string) (bool, error) {
	for p := filepath.Clean(dir); ; p = filepath.Dir(p) {
		var fs unix.Statfs_t
		err := unix.Statfs(p, &fs)
		if errors.Is(err, os.ErrNotExist) && p != filepath.Dir(p) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("look at %s: %w", p, err)
		}
		return fs.Type == unix.BPF_FS_MAGIC, nil
	}
}
