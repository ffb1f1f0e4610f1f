package netlab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is one network namespace with what an agent needs to believe that it has a machine to itself. Its methods may be
// called from several goroutines.
type Host struct {
	lab    *Lab
	name   string
	space  *space
	cgroup string
	bpffs  string
	state  string
	ports  []*port // one for each interface; guarded by lab.mu
}

func (h *Host) build() error {
	for _, dir := range []string{h.cgroup, h.bpffs} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(h.state, 0o700); err != nil {
		return err
	}
	return h.Do(func() error {
		if err := presetSysctls(); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find loopback: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("set loopback up: %w", err)
		}
		return nil
	})
}

// presetSysctls makes IPv6 addresses usable at once: a lab has no duplicates to detect. It runs inside the namespace, whose
// settings are what /proc/sys/net shows to a thread that is there.
func presetSysctls() error {
	for _, set := range []struct{ name, value string }{
		{"ipv6/conf/all/disable_ipv6", "0"},
		{"ipv6/conf/default/disable_ipv6", "0"},
		{"ipv6/conf/default/accept_dad", "0"},
		{"ipv6/conf/default/accept_ra", "0"},
	} {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", set.name), []byte(set.value), 0); err != nil {
			return err
		}
	}
	return nil
}

// Name is the host's name within the lab.
func (h *Host) Name() string { return h.name }

// NetNS is the path of the network namespace, as nsenter --net= takes it.
func (h *Host) NetNS() string { return h.space.path }

// CgroupRoot is the host's own cgroup v2 subtree: what an agent on it gets as cgroup_root.
func (h *Host) CgroupRoot() string { return h.cgroup }

// BPFFS is the host's directory in the lab's bpffs mount.
func (h *Host) BPFFS() string { return h.bpffs }

// StateDir is a directory below the lab's work directory, mode 0700.
func (h *Host) StateDir() string { return h.state }

// Cgroup makes the cgroup at path below the host's root, such as system.slice/api-server.service, and returns its full
// path. A cgroup that is there already is success.
func (h *Host) Cgroup(path string) (string, error) {
	if !filepath.IsLocal(path) {
		return "", fmt.Errorf("cgroup %q: want a path below the host's root", path)
	}
	full := filepath.Join(h.cgroup, path)
	if err := os.MkdirAll(full, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup on host %s: %w", h.name, err)
	}
	return full, nil
}

// Do runs f on a locked thread inside the host's namespace and returns what f returned. A socket made by f itself belongs
// to the namespace for good; one made by a goroutine that f starts does not. The thread's cgroup stays that of this
// process, so no workload identity comes with it: use Command for that.
func (h *Host) Do(f func() error) error { return h.lab.doIn(h.space, f) }

// doIn runs f inside a namespace of the lab, unless the lab was closed.
func (l *Lab) doIn(s *space, f func() error) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("enter %s: %w", s.path, err)
	}
	defer unix.Close(fd)
	return s.do(fd, f)
}

// DialContext connects from inside the namespace. The address has to be an IP and a port: a name would be looked up on a
// goroutine that is outside.
func (h *Host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from host %s: %w", h.name, err)
	}
	var conn net.Conn
	err := h.Do(func() error {
		var err error
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen opens a stream listener inside the namespace; the address has to be an IP and a port.
func (h *Host) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var ln net.Listener
	err := h.Do(func() error {
		var err error
		ln, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err
	})
	return ln, err
}

// Enter is a line for a shell that runs args inside the namespace and the cgroup, for a person to paste. An empty cgroup
// means the host's root; without args it is an interactive shell.
func (h *Host) Enter(cgroup string, args ...string) string {
	if len(args) == 0 {
		args = []string{"bash"}
	}
	for i, a := range args {
		args[i] = shellQuote(a)
	}
	procs := shellQuote(filepath.Join(h.cgroup, cgroup, "cgroup.procs"))
	inner := fmt.Sprintf("echo $$ > %s && exec nsenter --net=%s -- %s", procs, shellQuote(h.space.path), strings.Join(args, " "))
	return "sudo sh -c " + shellQuote(inner)
}

// shellQuote quotes where a POSIX shell would see more than one plain word.
func shellQuote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-./:=@%+,", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
