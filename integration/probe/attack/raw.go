package attack

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Constants of linux/if_xdp.h and linux/if_packet.h.
const (
	solXDP            = 283
	xdpUmemRegister   = 4
	packetQueueBypass = 20
	umemSize          = 4 << 12
	umemChunk         = 1 << 12
)

// raw sends packets that bring their own IP header.
func (a *attacker) raw() error {
	for _, p := range a.Packets {
		family, six := unix.AF_INET, len(p) > 0 && p[0]>>4 == 6
		if six {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err := a.step("socket", err); err != nil {
			return err
		}
		err = a.rawOptions(fd, six)
		if err == nil {
			err = a.step("send", unix.Sendto(fd, p, 0, destination(p)))
		}
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *attacker) rawOptions(fd int, six bool) error {
	var err error
	if six {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, ipv6HeaderIncluded, 1)
	} else {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_HDRINCL, 1)
	}
	if err == nil && a.does(Device) {
		err = unix.BindToDevice(fd, a.Spec.Device)
	}
	if err == nil && a.does(Mark) {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, a.Spec.Mark)
	}
	if err != nil {
		return a.step("option", err)
	}
	return nil
}

// destination is where a packet's own header says it goes.
func destination(p []byte) unix.Sockaddr {
	if p[0]>>4 == 6 {
		return &unix.SockaddrInet6{Addr: [16]byte(p[24:40])}
	}
	return &unix.SockaddrInet4{Addr: [4]byte(p[16:20])}
}

// packet sends below IP, on a device.
func (a *attacker) packet() error {
	kind := unix.SOCK_DGRAM
	if a.Frame {
		kind = unix.SOCK_RAW
	}
	fd, err := unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC, 0)
	if err := a.step("socket", err); err != nil {
		return err
	}
	a.fd = fd
	device, err := net.InterfaceByName(a.Spec.Device)
	if err != nil {
		return fmt.Errorf("find device: %w", err)
	}
	if a.does(Bypass) {
		if err := a.step(Bypass, unix.SetsockoptInt(fd, unix.SOL_PACKET, packetQueueBypass, 1)); err != nil {
			return err
		}
	}
	for _, p := range a.Packets {
		claim := etherType(p)
		if a.Claim != 0 {
			claim = a.Claim
		}
		to := &unix.SockaddrLinklayer{Ifindex: device.Index, Protocol: networkOrder(claim), Halen: uint8(len(a.MAC))}
		copy(to.Addr[:], a.MAC)
		if a.Frame {
			p = a.frame(p)
		}
		if err := a.step("send", unix.Sendto(fd, p, 0, to)); err != nil {
			return err
		}
	}
	return nil
}

// frame puts an Ethernet header before a packet.
func (a *attacker) frame(p []byte) []byte {
	f := make([]byte, 12)
	copy(f, a.MAC)
	for range a.Tags {
		f = binary.BigEndian.AppendUint16(f, unix.ETH_P_8021Q)
		f = binary.BigEndian.AppendUint16(f, 0)
	}
	return append(binary.BigEndian.AppendUint16(f, etherType(p)), p...)
}

// etherType of a packet.
func etherType(p []byte) uint16 {
	if p[0]>>4 == 6 {
		return unix.ETH_P_IPV6
	}
	return unix.ETH_P_IP
}

// networkOrder is how the kernel wants it.
func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// umem is struct xdp_umem_reg.
type umem struct {
	addr, size                uint64
	chunk, headroom, flags, _ uint32
}

// xdp registers memory for AF_XDP, without which no packet can be sent by it.
func (a *attacker) xdp() error {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err := a.step("socket", err); err != nil {
		return err
	}
	a.fd = fd
	memory, err := unix.Mmap(-1, 0, umemSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("get memory: %w", err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	u := umem{addr: uint64(uintptr(unsafe.Pointer(&memory[0]))), size: umemSize, chunk: umemChunk}
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), solXDP, xdpUmemRegister, uintptr(unsafe.Pointer(&u)), unsafe.Sizeof(u), 0)
	if errno != 0 {
		return a.step("umem", errno)
	}
	return a.step("umem", nil)
}

// connectUnspecified takes a connection back.
func connectUnspecified(fd int) error {
	unspecified := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified))
	if errno != 0 {
		return errno
	}
	return nil
}

// cage runs attacks, one a line of input, as root of a user and network namespace of its own. It tells its process id, so
// that the host can give it a device, and goes on at a first line of input.
func (a *attacker) cage(ctx context.Context) error {
	if os.Getenv(caged) == "" {
		return a.enterCage(ctx)
	}
	fmt.Fprintln(a.out, "opened")
	if _, err := a.in.ReadString('\n'); err != nil {
		return fmt.Errorf("wait for a device: %w", err)
	}
	for _, command := range a.Setup {
		if out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("set up the cage: %v: %w: %s", command, err, out)
		}
	}
	return many(ctx, a.in, a.out)
}

// caged marks the process inside.
const caged = "SIGNET_PROBE_CAGED"

func (a *attacker) enterCage(ctx context.Context) error {
	text, err := json.Marshal(a.Spec)
	if err != nil {
		return fmt.Errorf("write attack: %w", err)
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "attack", string(text))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, a.out, a.out
	cmd.Env = append(os.Environ(), caged+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return a.step("cage", err)
	}
	fmt.Fprintln(a.out, "pid", cmd.Process.Pid)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("inside the cage: %w", err)
	}
	return nil
}

// overlay reports whether an address lies in the default overlay ranges.
func overlay(a netip.Addr) bool {
	return netip.MustParsePrefix("198.18.0.0/15").Contains(a) || a.Is6() && a.IsPrivate()
}
