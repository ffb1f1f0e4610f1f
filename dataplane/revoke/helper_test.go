package revoke

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary a process under test: it reads commands, one a line, and answers each with one line.
const helperEnv = "SIGNET_REVOKE_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) == "" {
		os.Exit(m.Run())
	}
	h := helper{fds: map[string]int{}, from: map[string]unix.Sockaddr{}}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		answer, err := h.run(strings.Fields(in.Text()))
		var errno unix.Errno
		switch {
		case errors.As(err, &errno):
			answer = unix.ErrnoName(errno)
		case err != nil:
			answer = "error: " + err.Error()
		}
		fmt.Println(answer)
	}
}

// helperWait bounds what a helper waits for, in milliseconds, unless it is told otherwise.
const helperWait = 2000

// helper has sockets by name.
type helper struct {
	fds  map[string]int
	from map[string]unix.Sockaddr // who sent the last datagram
}

func (h *helper) run(f []string) (string, error) {
	switch cmd, name := f[0], f[1]; cmd {
	case "listen": // NAME KIND ADDRESS
		return "ok", h.listen(name, f[2], f[3])
	case "connect": // NAME KIND ADDRESS
		return h.connect(name, f[2], f[3])
	case "accept": // NAME LISTENER
		if err := poll(h.fds[f[2]], unix.POLLIN, helperWait); err != nil {
			return "", err
		}
		fd, _, err := unix.Accept4(h.fds[f[2]], unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		h.fds[name] = fd
		return "ok", err
	case "send": // NAME TEXT
		_, err := unix.Write(h.fds[name], []byte(f[2]))
		return "ok", err
	case "recv": // NAME
		return h.receive(name)
	case "answer": // NAME: connect to who sent last
		return "ok", unix.Connect(h.fds[name], h.from[name])
	case "fate": // NAME MILLISECONDS: how the socket ended, or alive
		ms, err := strconv.Atoi(f[2])
		if err != nil {
			return "", err
		}
		return fate(h.fds[name], ms)
	case "many": // PAIRS ADDRESS: connections to listeners of its own, kept until the end
		pairs, err := strconv.Atoi(name)
		if err != nil {
			return "", err
		}
		return "ok", many(pairs, f[2])
	case "close":
		return "ok", unix.Close(h.fds[name])
	}
	return "", fmt.Errorf("unknown command %v", f)
}

func (h *helper) socket(name, kind string) (err error) {
	family, typ, proto := unix.AF_INET, unix.SOCK_STREAM, 0
	if strings.HasSuffix(kind, "6") {
		family = unix.AF_INET6
	}
	switch {
	case strings.HasPrefix(kind, "udp"):
		typ = unix.SOCK_DGRAM
	case strings.HasPrefix(kind, "mptcp"):
		proto = unix.IPPROTO_MPTCP
	}
	h.fds[name], err = unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	return err
}

func address(kind, text string) unix.Sockaddr {
	ap := netip.MustParseAddrPort(text)
	if strings.HasSuffix(kind, "6") {
		return &unix.SockaddrInet6{Addr: ap.Addr().As16(), Port: int(ap.Port())}
	}
	return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
}

func (h *helper) listen(name, kind, at string) error {
	if err := h.socket(name, kind); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(h.fds[name], unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(h.fds[name], address(kind, at)); err != nil || strings.HasPrefix(kind, "udp") {
		return err
	}
	return unix.Listen(h.fds[name], 8)
}

// connect answers "pending" when nobody answers within a short while.
func (h *helper) connect(name, kind, to string) (string, error) {
	if err := h.socket(name, kind); err != nil {
		return "", err
	}
	err := unix.Connect(h.fds[name], address(kind, to))
	if !errors.Is(err, unix.EINPROGRESS) {
		return "ok", err
	}
	if err := poll(h.fds[name], unix.POLLOUT, 200); err != nil {
		return "pending", nil
	}
	return "ok", socketError(h.fds[name])
}

// many connects so many times to a listener of its own.
func many(pairs int, at string) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	h := helper{fds: map[string]int{}}
	if err := h.listen("l", "tcp4", at); err != nil {
		return err
	}
	for range pairs {
		if _, err := h.connect("c", "tcp4", at); err != nil {
			return err
		}
		if _, _, err := unix.Accept(h.fds["l"]); err != nil {
			return err
		}
	}
	return nil
}

func socketError(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

func (h *helper) receive(name string) (string, error) {
	if err := poll(h.fds[name], unix.POLLIN, helperWait); err != nil {
		return "", err
	}
	var buf [256]byte
	n, from, err := unix.Recvfrom(h.fds[name], buf[:], 0)
	h.from[name] = from
	return string(buf[:max(n, 0)]), err
}

func fate(fd, ms int) (string, error) {
	if err := poll(fd, 0, ms); errors.Is(err, unix.ETIMEDOUT) {
		return "alive", nil
	}
	return "ended without an error", socketError(fd)
}

// poll waits for events, or for the end of the socket.
func poll(fd int, events int16, ms int) error {
	end := time.Now().Add(time.Duration(ms) * time.Millisecond)
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Poll(fds, int(max(0, time.Until(end).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n == 0 && err == nil {
			return unix.ETIMEDOUT
		}
		return err
	}
}
