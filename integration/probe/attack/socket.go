package attack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/integration/probe/forge"
	"golang.org/x/sys/unix"
)

// Socket options that x/sys does not name.
const ipv6HeaderIncluded = 36 // IPV6_HDRINCL, linux/in6.h

// sockaddr is an address as the socket's family writes it.
func (a *attacker) sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if a.V6 {
		return &unix.SockaddrInet6{Addr: ap.Addr().As16(), Port: int(ap.Port())}
	}
	return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
}

// open makes the socket, or takes somebody else's.
func (a *attacker) open() error {
	if a.Take != "" {
		return a.take()
	}
	family, kind, proto := unix.AF_INET, unix.SOCK_STREAM, 0
	if a.V6 {
		family = unix.AF_INET6
	}
	switch a.Proto {
	case "udp":
		kind = unix.SOCK_DGRAM
	case "ping": // ICMP echo without any right, where the host lets users
		kind, proto = unix.SOCK_DGRAM, unix.IPPROTO_ICMP
		if a.V6 {
			proto = unix.IPPROTO_ICMPV6
		}
	case "mptcp":
		proto = unix.IPPROTO_MPTCP
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	a.fd = fd
	return a.step("socket", err)
}

func (a *attacker) socket() error {
	if err := a.open(); err != nil {
		return err
	}
	if a.does(Dissolve) {
		if err := a.dissolve(); err != nil {
			return err
		}
	}
	if err := a.options(); err != nil {
		return err
	}
	if a.does(Bind) {
		if err := a.step("bind", unix.Bind(a.fd, a.sockaddr(a.Src))); err != nil {
			return err
		}
	}
	if a.Give != "" {
		return a.give()
	}
	if err := a.hold(); err != nil {
		return err
	}
	return a.use()
}

// use sends by the socket, each way that the protocol has.
func (a *attacker) use() error {
	if !a.Dst.IsValid() {
		return nil
	}
	switch {
	case a.does(FastOpen):
		err := unix.Sendto(a.fd, []byte(a.Payload), unix.MSG_FASTOPEN, a.sockaddr(a.Dst))
		waits := errors.Is(err, unix.EINPROGRESS) // there was no cookie yet, so the data stays here
		err = a.established(err)
		if !errors.Is(err, unix.EACCES) {
			a.local()
		}
		if err := a.step("fastopen", err); err != nil || !waits {
			return err
		}
		return a.step("send", a.datagram(nil))
	case a.Proto != "tcp" && a.Proto != "mptcp" && !a.does(Connect):
		err := a.datagram(a.sockaddr(a.Dst))
		a.local()
		return a.step("send", err)
	}
	err := a.established(unix.Connect(a.fd, a.sockaddr(a.Dst)))
	if !errors.Is(err, unix.EACCES) {
		a.local()
	}
	if err := a.step("connect", err); err != nil {
		return err
	}
	return a.step("send", a.datagram(nil))
}

// established waits for a TCP connection, as long as the Spec says.
func (a *attacker) established(err error) error {
	if !errors.Is(err, unix.EINPROGRESS) || a.Wait == 0 {
		return err
	}
	deadline := time.Now().Add(time.Duration(a.Wait) * time.Millisecond)
	for {
		left := time.Until(deadline).Milliseconds()
		if left <= 0 {
			return unix.ETIMEDOUT
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(a.fd), Events: unix.POLLOUT}}, int(left))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n == 0 {
			continue
		}
		failed, err := unix.GetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || failed == 0 {
			return err
		}
		return unix.Errno(failed)
	}
}

// datagram sends the payload, with the forged source where that is the trick.
func (a *attacker) datagram(to unix.Sockaddr) error {
	var oob []byte
	if a.does(PacketInfo) {
		if a.V6 {
			oob = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: a.Src.Addr().As16()})
		} else {
			oob = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: a.Src.Addr().As4()})
		}
	}
	data := []byte(a.Payload)
	if a.Proto == "ping" {
		header := []byte{8, 0, 0, 0, 0, 0, 0, 1} // an echo request; the kernel fills in the rest
		if a.V6 {
			header[0] = 128
		}
		data = append(header, data...)
	}
	return unix.Sendmsg(a.fd, data, oob, to, 0)
}

// local tells the source that the kernel chose.
func (a *attacker) local() {
	sa, err := unix.Getsockname(a.fd)
	if err != nil {
		return
	}
	var at netip.AddrPort
	switch s := sa.(type) {
	case *unix.SockaddrInet4:
		at = netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		at = netip.AddrPortFrom(netip.AddrFrom16(s.Addr).Unmap(), uint16(s.Port))
	}
	fmt.Fprintln(a.out, "local", at)
}

// dissolve connects somewhere else first, and takes that back.
func (a *attacker) dissolve() error {
	if err := a.step("connect before", a.established(unix.Connect(a.fd, a.sockaddr(a.Before)))); err != nil {
		return err
	}
	a.local()
	// struct sockaddr of AF_UNSPEC; x/sys has no type for it.
	return a.step("dissolve", connectUnspecified(a.fd))
}

// options does the tricks that are socket options.
func (a *attacker) options() error {
	level, free, transparent := unix.IPPROTO_IP, unix.IP_FREEBIND, unix.IP_TRANSPARENT
	if a.V6 && !a.Src.Addr().Unmap().Is4() {
		level, free, transparent = unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, unix.IPV6_TRANSPARENT
	}
	for _, trick := range a.Tricks {
		var err error
		switch trick {
		case FreeBind:
			err = unix.SetsockoptInt(a.fd, level, free, 1)
		case Transparent:
			err = unix.SetsockoptInt(a.fd, level, transparent, 1)
		case Device:
			err = unix.BindToDevice(a.fd, a.Spec.Device)
		case Mark:
			err = unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_MARK, a.Spec.Mark)
		case ReusePort:
			err = unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		case Route:
			// The option's first hop becomes the packet's destination; the socket's own is the last.
			err = unix.SetsockoptString(a.fd, unix.IPPROTO_IP, unix.IP_OPTIONS, string(forge.LooseRoute(a.Via)))
		default:
			continue
		}
		if err := a.step(trick, err); err != nil {
			return err
		}
	}
	return nil
}

// give hands the socket to whoever connects to the path, once.
func (a *attacker) give() error {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.Give, Net: "unix"})
	if err != nil {
		return fmt.Errorf("offer the socket: %w", err)
	}
	defer ln.Close()
	fmt.Fprintln(a.out, "opened")
	conn, err := ln.AcceptUnix()
	if err != nil {
		return fmt.Errorf("hand the socket over: %w", err)
	}
	defer conn.Close()
	_, _, err = conn.WriteMsgUnix([]byte{0}, unix.UnixRights(a.fd), nil)
	return a.step("give", err)
}

func (a *attacker) take() error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: a.Take, Net: "unix"})
	if err != nil {
		return fmt.Errorf("ask for the socket: %w", err)
	}
	defer conn.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	if _, _, _, _, err = conn.ReadMsgUnix(make([]byte, 1), oob); err != nil {
		return fmt.Errorf("take the socket: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("take the socket: %d messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return fmt.Errorf("take the socket: %w", err)
	}
	a.fd = fds[0]
	return a.step("take", nil)
}
