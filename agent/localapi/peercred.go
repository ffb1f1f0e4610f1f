package localapi

import (
	"encoding/binary"
	"net"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// callerKey finds the caller in a request's context.
type callerKey struct{}

// caller is what the kernel says of the process at the other end, as of its connect. The zero value may do nothing.
type caller struct {
	known  bool
	uid    uint32
	groups []uint32 // primary and supplementary
}

// may reports whether the caller may read, or with rootOnly change things.
func (c caller) may(rootOnly bool, gid int) bool {
	switch {
	case !c.known:
		return false
	case c.uid == 0:
		return true
	}
	return !rootOnly && gid > 0 && slices.Contains(c.groups, uint32(gid))
}

func callerOf(c net.Conn) caller {
	u, ok := c.(interface{ unixConn() *net.UnixConn })
	if !ok {
		return caller{}
	}
	raw, err := u.unixConn().SyscallConn()
	if err != nil {
		return caller{}
	}
	var who caller
	if err := raw.Control(func(fd uintptr) { who = credentials(int(fd)) }); err != nil {
		return caller{}
	}
	return who
}

func credentials(fd int) caller {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return caller{}
	}
	return caller{known: true, uid: cred.Uid, groups: append(peerGroups(fd), cred.Gid)}
}

// maxGroups is NGROUPS_MAX of Linux.
const maxGroups = 65536

// peerGroups reads SO_PEERGROUPS (Linux 4.13), which x/sys has no function for. Where it fails, only the primary group
// counts.
func peerGroups(fd int) []uint32 {
	buf := make([]byte, 64*4)
	for {
		size := uint32(len(buf))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size) > len(buf) && size <= maxGroups*4:
			buf = make([]byte, size)
		case errno != 0:
			return nil
		default:
			out := make([]uint32, 0, size/4)
			for i := 0; i+4 <= int(size); i += 4 {
				out = append(out, binary.NativeEndian.Uint32(buf[i:]))
			}
			return out
		}
	}
}

// limited lets at most as many connections in as it has slots; one more is closed at once, so that readers who do not
// read cannot hold up the listener.
type limited struct {
	net.Listener
	slots chan struct{}
}

type limitedConn struct {
	*net.UnixConn
	once  sync.Once
	slots chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err //nolint:wrapcheck // http.Server looks at the very error
		}
		u, ok := c.(*net.UnixConn)
		if !ok {
			_ = c.Close()
			return nil, net.ErrClosed
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{UnixConn: u, slots: l.slots}, nil
		default:
			_ = u.Close()
		}
	}
}

func (c *limitedConn) unixConn() *net.UnixConn { return c.UnixConn }

func (c *limitedConn) Close() error {
	c.once.Do(func() { <-c.slots })
	return c.UnixConn.Close() //nolint:wrapcheck // as above
}
