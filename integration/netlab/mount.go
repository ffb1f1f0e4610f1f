package netlab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is what the lab needs from one line of mountinfo.
type mount struct {
	point  string
	fstype string
	source string
}

func readMounts() ([]mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []mount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			out = append(out, m)
		}
	}
	return out, lines.Err()
}

// parseMount reads one line of mountinfo: fixed fields, any number of tags, a hyphen, then type, source and options.
func parseMount(line string) (mount, bool) {
	before, after, ok := strings.Cut(line, " - ")
	fixed, rest := strings.Fields(before), strings.Fields(after)
	if !ok || len(fixed) < 6 || len(rest) < 2 {
		return mount{}, false
	}
	return mount{point: unescape(fixed[4]), fstype: rest[0], source: unescape(rest[1])}, true
}

// unescape undoes the kernel's \ooo form for blanks and backslashes.
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

// bpffsSource is the mount's source name; it tells to whom a mount belongs when its directory is not known any more.
func bpffsSource(prefix string) string { return "netlab-" + prefix }

// mountBPFFS mounts a bpffs of the lab's own on dir, which must not exist yet or be empty.
func mountBPFFS(prefix, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(bpffsSource(prefix), dir, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs on %s: %w", dir, err)
	}
	if err := unix.Mount("none", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %s private: %w", dir, err)
	}
	return nil
}

// unmountBPFFS unpins everything of the lab at once. What is not mounted is success.
func unmountBPFFS(dir string) error {
	err := unix.Unmount(dir, 0)
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("bpffs %s was still in use: %w", dir, errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)))
	} else if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if rmErr := os.Remove(dir); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	return err
}
