package enforce

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

// helperEnv makes the test binary a process under test: it reads commands from its input, one a line, and answers each
// with one line.
const helperEnv = "SIGNET_ENFORCE_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		helper()
		return
	}
	os.Exit(m.Run())
}

// helperWait bounds everything that a helper waits for.
const helperWait = 2 * time.Second

type helperState struct {
	fd int
	v6 bool
}

func helper() {
	s := &helperState{fd: -1}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		f := strings.Fields(in.Text())
		answer, err := s.run(f[0], f[1:])
		var errno unix.Errno
		switch {
		case errors.As(err, &errno):
			answer = unix.ErrnoName(errno)
		case err != nil:
			answer = "error: " + err.Error()
		case answer == "":
			answer = "ok"
		}
		fmt.Println(answer)
	}
}

// run does one command. Sockets do not block, but for wait and recv, which wait for a bounded time.
func (s *helperState) run(cmd string, args []string) (string, error) {
	switch cmd {
	case "socket":
		return "", s.socket(args[0])
	case "bind":
		return "", unix.Bind(s.fd, s.address(args[0]))
	case "freebind":
		return "", unix.SetsockoptInt(s.fd, unix.SOL_IP, unix.IP_FREEBIND, 1)
	case "connect":
		err := unix.Connect(s.fd, s.address(args[0]))
		if errors.Is(err, unix.EINPROGRESS) {
			return "inprogress", nil
		}
		return "", err
	case "device":
		return "", unix.BindToDevice(s.fd, args[0])
	case "option":
		return "", s.option(args)
	case "unspec":
		return "", s.disconnect()
	case "wait":
		return "", s.connected()
	case "listen":
		return "", unix.Listen(s.fd, 8)
	case "accept":
		return s.accept()
	case "name":
		return s.name()
	case "sendto":
		return "", unix.Sendto(s.fd, []byte(args[1]), 0, s.address(args[0]))
	case "sendfrom":
		return "", s.sendFrom(args[0], args[1])
	case "send":
		_, err := unix.Write(s.fd, []byte(args[0]))
		return "", err
	case "recv":
		return s.receive()
	case "rawsend":
		return "", s.rawSend(args)
	case "setuid":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return "", err
		}
		return "", unix.Setuid(n)
	}
	return "", fmt.Errorf("unknown command %s", cmd)
}

func (s *helperState) socket(kind string) (err error) {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
	s.v6 = strings.HasSuffix(kind, "6")
	family := unix.AF_INET
	if s.v6 {
		family = unix.AF_INET6
	}
	typ, proto := unix.SOCK_DGRAM, 0
	switch strings.TrimRight(kind, "46") {
	case "tcp":
		typ = unix.SOCK_STREAM
	case "mptcp":
		typ, proto = unix.SOCK_STREAM, unix.IPPROTO_MPTCP
	case "ping":
		proto = unix.IPPROTO_ICMP
		if s.v6 {
			proto = unix.IPPROTO_ICMPV6
		}
	case "raw":
		typ, proto = unix.SOCK_RAW, unix.IPPROTO_RAW
	case "xdp":
		family, typ, proto = unix.AF_XDP, unix.SOCK_RAW, 0
	case "packet":
		family, typ, proto = unix.AF_PACKET, unix.SOCK_DGRAM, 0
	}
	s.fd, err = unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err == nil && typ == unix.SOCK_STREAM {
		err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return err
}

func (s *helperState) address(text string) unix.Sockaddr {
	ap := netip.MustParseAddrPort(text)
	if s.v6 {
		return &unix.SockaddrInet6{Addr: ap.Addr().As16(), Port: int(ap.Port())}
	}
	return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
}

// option sets a socket option to 1: option LEVEL NAME [LENGTH].
func (s *helperState) option(args []string) error {
	var n [3]int
	n[2] = 4
	for i, a := range args {
		var err error
		if n[i], err = strconv.Atoi(a); err != nil {
			return err
		}
	}
	value := make([]byte, n[2])
	value[0] = 1
	return unix.SetsockoptString(s.fd, n[0], n[1], string(value))
}

// disconnect is connect(AF_UNSPEC), which the unix package cannot say.
func (s *helperState) disconnect() error {
	var sa [16]byte
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(s.fd), uintptr(pointer(&sa)), 16)
	if errno != 0 {
		return errno
	}
	return nil
}

func (s *helperState) poll(events int16) error {
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: events}}
	for {
		n, err := unix.Poll(fds, int(helperWait.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n == 0 && err == nil {
			return unix.ETIMEDOUT
		}
		return err
	}
}

func (s *helperState) connected() error {
	if err := s.poll(unix.POLLOUT); err != nil {
		return err
	}
	n, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

// accept makes the accepted connection the helper's socket.
func (s *helperState) accept() (string, error) {
	if err := s.poll(unix.POLLIN); err != nil {
		return "", err
	}
	fd, from, err := unix.Accept4(s.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return "", err
	}
	unix.Close(s.fd)
	s.fd = fd
	return "from " + show(from).Addr().String(), nil
}

func (s *helperState) name() (string, error) {
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return "", err
	}
	return show(sa).Addr().String(), nil
}

func (s *helperState) receive() (string, error) {
	if err := s.poll(unix.POLLIN); err != nil {
		return "", err
	}
	var buf [2048]byte
	n, from, err := unix.Recvfrom(s.fd, buf[:], 0)
	if err != nil {
		return "", err
	}
	if from == nil {
		return string(buf[:n]), nil
	}
	return fmt.Sprintf("%s from %v", buf[:n], show(from)), nil
}

// sendFrom sends with a source address in ancillary data. The destination "-" is the one that the socket is connected to.
func (s *helperState) sendFrom(source, to string) error {
	var oob []byte
	if s.v6 {
		oob = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: netip.MustParseAddr(source).As16()})
	} else {
		oob = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: netip.MustParseAddr(source).As4()})
	}
	var dst unix.Sockaddr
	if to != "-" {
		dst = s.address(to)
	}
	return unix.Sendmsg(s.fd, []byte("x"), oob, dst, 0)
}

// rawSend sends a UDP packet with headers of its own: rawsend SRC DST [IFINDEX].
func (s *helperState) rawSend(args []string) error {
	src, dst := netip.MustParseAddrPort(args[0]), netip.MustParseAddrPort(args[1])
	packet := ipPacket(src, dst, protoUDP, udpHeader(src, dst, "forged"))
	if len(args) < 3 {
		return unix.Sendto(s.fd, packet, 0, &unix.SockaddrInet4{Addr: dst.Addr().As4()})
	}
	index, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	proto := uint16(unix.ETH_P_IP)
	if dst.Addr().Is6() {
		proto = unix.ETH_P_IPV6
	}
	return unix.Sendto(s.fd, packet, 0, &unix.SockaddrLinklayer{
		Protocol: proto<<8 | proto>>8, Ifindex: index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	})
}

func show(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
