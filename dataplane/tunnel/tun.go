package tunnel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

const (
	tunPath = "/dev/net/tun"
	// tunFlags: IP packets without a link header, no packet-info header, and the virtio header that carries segmentation
	// offload in both directions. An existing device must have been made with the same ones.
	tunFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR

	// DefaultMTU leaves room for WireGuard over IPv6 in an Ethernet frame of 1500 bytes.
	DefaultMTU = 1420
	// minMTU is the smallest that IPv6 permits (RFC 8200, section 5).
	minMTU = 1280
	// maxMTU is the largest inner packet that fits one UDP datagram with WireGuard's and IPv6's overhead of 80 bytes.
	maxMTU = 65535 - 80
)

// Probe reports which kind of tunnel this host can have, or why it can have none.
func Probe() (kind string, err error) {
	if err := probe(tunPath); err != nil {
		return "", err
	}
	return "userspace", nil
}

func probe(path string) error {
	fd, err := openClone(path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	features, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	if err != nil {
		return fmt.Errorf("%w: %s does not answer like a TUN device: %w", ErrNoTUN, path, err)
	}
	if features&tunFlags != tunFlags {
		return fmt.Errorf("%w: the kernel's TUN driver has features %#x, needed are %#x", ErrNoTUN, features, tunFlags)
	}
	return haveNetAdmin()
}

// haveNetAdmin looks at the effective capabilities: without CAP_NET_ADMIN the device file opens, but no device can be
// made with it.
func haveNetAdmin() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read the process's capabilities: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return fmt.Errorf("%w: making a tunnel device is not permitted: CAP_NET_ADMIN is needed, run signetd as root", ErrNoTUN)
	}
	return nil
}

// openClone opens the file from which TUN devices are made. It is non-blocking from the start, because the runtime's
// poller must be able to wait for it.
func openClone(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return -1, fmt.Errorf("%w: %s is missing: run modprobe tun, or give the container that device: %w", ErrNoTUN, path, err)
	case errors.Is(err, fs.ErrPermission):
		return -1, fmt.Errorf("%w: opening %s is not permitted: run signetd as root, and allow that device where a device policy is in force: %w", ErrNoTUN, path, err)
	default:
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
}

// openTUN makes the device or adopts the one that an earlier agent left, keeps it beyond this process's life, and sets
// its MTU. It does not set the device up.
func openTUN(name string, mtu int) (_ tun.Device, err error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	existed, err := exists(name)
	if err != nil {
		return nil, err
	}
	fd, err := attach(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && !existed { // nothing half-made stays behind
			_ = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0)
		}
		_ = unix.Close(fd)
	}()
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return nil, fmt.Errorf("make device %s persistent: %w", name, err)
	}
	if err := setMTU(name, mtu); err != nil {
		return nil, err
	}
	// The unmonitored form has no listeners of its own for link events. They would set the engine up whenever the link
	// comes up, and would wake an idle host once a second.
	// It gets a descriptor of its own, because it owns that one also when it fails.
	engineFD, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of device %s: %w", name, err)
	}
	dev, _, err := tun.CreateUnmonitoredTUNFromFD(engineFD)
	if err != nil {
		return nil, fmt.Errorf("hand device %s to the engine: %w", name, err)
	}
	return dev, nil
}

// RemoveDevice takes the device away that an agent left. It is the end of enforcement on that device, so only a
// release of the host calls it. A device that does not exist is success; one that an engine holds is ErrBusy.
func RemoveDevice(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	if ok, err := exists(name); err != nil || !ok {
		return err
	}
	fd, err := attach(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0); err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}

// attach connects a new descriptor to the named device, which the kernel makes when it does not exist.
func attach(name string) (int, error) {
	fd, err := openClone(tunPath)
	if err != nil {
		return -1, err
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(tunFlags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err == nil {
		return fd, nil
	}
	_ = unix.Close(fd)
	switch {
	case errors.Is(err, unix.EBUSY):
		return -1, fmt.Errorf("%w: %s: is another signetd running?", ErrBusy, name)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EEXIST):
		return -1, fmt.Errorf("interface %s exists and is not a TUN device of Signet: choose another interface name, or remove it with ip link del %s: %w", name, name, err)
	case errors.Is(err, fs.ErrPermission):
		return -1, fmt.Errorf("%w: making device %s is not permitted: CAP_NET_ADMIN is needed, run signetd as root: %w", ErrNoTUN, name, err)
	default:
		return -1, fmt.Errorf("make device %s: %w", name, err)
	}
}

// checkName refuses what the kernel would refuse or, for a percent sign, expand.
func checkName(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." || strings.ContainsAny(name, "/:% \t\n\v\f\r\x00") {
		return fmt.Errorf("interface name %q is not valid: 1 to %d characters without slash, colon, percent sign or space", name, unix.IFNAMSIZ-1)
	}
	return nil
}

func exists(name string) (bool, error) {
	_, err := ifIoctl(name, unix.SIOCGIFINDEX, 0)
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up interface %s: %w", name, err)
	}
	return true, nil
}

func setMTU(name string, mtu int) error {
	old, err := ifIoctl(name, unix.SIOCGIFMTU, 0)
	if err == nil && old != uint32(mtu) {
		_, err = ifIoctl(name, unix.SIOCSIFMTU, uint32(mtu))
	}
	if err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", name, mtu, err)
	}
	return nil
}

// ifIoctl makes a request about a named interface, in the network namespace of the calling thread.
func ifIoctl(name string, request uint, value uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	// The kernel's struct ifreq: a name and a union, of which these requests use the first four bytes.
	var req struct {
		name  [unix.IFNAMSIZ]byte
		value uint32
		_     [20]byte
	}
	copy(req.name[:], name)
	req.value = value
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&req)))
	runtime.KeepAlive(&req)
	if errno != 0 {
		return 0, errno
	}
	return req.value, nil
}
