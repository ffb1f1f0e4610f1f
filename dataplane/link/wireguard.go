package link

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Errors that a caller of the WireGuard functions tells apart.
var (
	// ErrNoWireGuard: this kernel makes no WireGuard device, or does not let this process make one.
	ErrNoWireGuard = errors.New("kernel has no WireGuard")
	// ErrTUN: a TUN device has the name. The one who made it must remove it.
	ErrTUN = errors.New("the name belongs to a TUN device")
	// ErrForeign: a device of somebody else has the name.
	ErrForeign = errors.New("the name belongs to a device of somebody else")
)

const (
	// wireGuardMark is the alias of our devices. Unlike a TUN device, which nobody else can hold while it is ours, a
	// WireGuard device tells nothing about its owner, and an operator's own must never be taken over or removed.
	wireGuardMark = "signet"
	// probeName with a random number is short enough for a device, and nobody else's.
	probeName = "sigprobe%d"
	// probeNumbers bounds that number: 7 digits fill the 15 characters of a name.
	probeNumbers = 1e7
)

// WireGuard is the kernel's WireGuard device, watched until Close. The device is not bound to it: it stays, with its keys,
// peers and sessions.
type WireGuard struct {
	name  string
	index int
	watch *Watcher
	gone  chan struct{}

	asking struct {
		sync.Mutex                 // guards handle
		handle     *netlink.Handle // in the namespace of the thread that opened it; nil after Close
	}
	mu    sync.Mutex // guards state
	state wireGuardState
}

// wireGuardState is what the kernel told last.
type wireGuardState struct {
	up    bool
	downs uint64 // how often it went down; each time it forgot its sessions
	gone  bool
}

// ProbeWireGuard makes a WireGuard device and removes it: only that shows that the module is there or can be loaded, and
// that this process may. It fails with ErrNoWireGuard and the reason.
func ProbeWireGuard() error {
	l, err := addWireGuard(fmt.Sprintf(probeName, rand.IntN(probeNumbers)), 0)
	if err != nil {
		return err
	}
	if err := netlink.LinkDel(l); err != nil {
		return fmt.Errorf("remove the device %s that probed for WireGuard: %w", l.Attrs().Name, err)
	}
	return nil
}

// OpenWireGuard makes the device, which is not up then, or adopts the one that an earlier agent left, and sets its MTU.
// A TUN device of that name is ErrTUN, any other device that is not ours ErrForeign.
func OpenWireGuard(name string, mtu int) (*WireGuard, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	l, err := findWireGuard(name)
	made := errors.Is(err, ErrNoInterface)
	if made {
		l, err = makeWireGuard(name, mtu)
	}
	if err != nil {
		return nil, err
	}
	if l.Attrs().MTU != mtu && !made {
		if err := netlink.LinkSetMTU(l, mtu); err != nil {
			return nil, explain(fmt.Errorf("set MTU of %s to %d: %w", name, mtu, err))
		}
	}
	w, err := watchWireGuard(l)
	if err != nil && made { // nothing half-made stays behind
		err = errors.Join(err, netlink.LinkDel(l))
	}
	return w, err
}

// RemoveWireGuard removes a device of ours, and reports whether there was one. No device, or one that is no WireGuard
// device, is success: it is left to others. A WireGuard device that is not ours is ErrForeign.
func RemoveWireGuard(name string) (removed bool, err error) {
	if err := checkName(name); err != nil {
		return false, err
	}
	l, err := findWireGuard(name)
	var other *otherKindError
	switch {
	case errors.Is(err, ErrNoInterface), errors.Is(err, ErrTUN), errors.As(err, &other):
		return false, nil
	case err != nil:
		return false, err
	}
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return false, explain(fmt.Errorf("remove device %s: %w", name, err))
	}
	return true, nil
}

// otherKindError is an ErrForeign of a device that is no WireGuard device.
type otherKindError struct{ name, kind string }

func (e *otherKindError) Error() string {
	return fmt.Sprintf("%v: %s is of kind %s: choose another interface name, or remove it with ip link del %s", ErrForeign, e.name, e.kind, e.name)
}

func (e *otherKindError) Unwrap() error { return ErrForeign }

// findWireGuard finds our device of that name; ErrNoInterface when nothing has the name.
func findWireGuard(name string) (netlink.Link, error) {
	l, err := find(name)
	if err != nil {
		return nil, err
	}
	switch kind := l.Type(); {
	case kind == "tuntap" || kind == "tun":
		return nil, fmt.Errorf("%w: %s", ErrTUN, name)
	case kind != "wireguard":
		return nil, &otherKindError{name, kind}
	case l.Attrs().Alias != wireGuardMark:
		return nil, fmt.Errorf("%w: %s is a WireGuard device without the alias %q: choose another interface name, or remove it with ip link del %s", ErrForeign, name, wireGuardMark, name)
	}
	return l, nil
}

// makeWireGuard makes our device. The kernel takes no alias together with a new device, so that one which was interrupted
// here is refused by the next start, with a hint.
func makeWireGuard(name string, mtu int) (netlink.Link, error) {
	l, err := addWireGuard(name, mtu)
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetAlias(l, wireGuardMark); err != nil {
		return nil, explain(errors.Join(fmt.Errorf("mark %s as ours: %w", name, err), netlink.LinkDel(l)))
	}
	return l, nil
}

// addWireGuard makes a device; an MTU of 0 leaves the kernel's choice.
func addWireGuard(name string, mtu int) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	l := &netlink.Wireguard{LinkAttrs: attrs}
	err := netlink.LinkAdd(l)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: making a device is not permitted: CAP_NET_ADMIN is needed, run signetd as root: %w", ErrNoWireGuard, err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, fmt.Errorf("%w: the module wireguard is neither built in nor could it be loaded: %w", ErrNoWireGuard, err)
	default:
		return nil, fmt.Errorf("%w: making the device %s failed: %w", ErrNoWireGuard, name, err)
	}
	return find(name)
}

// watchWireGuard follows the device's state. The watch stands before the state is read, so that no change falls between.
func watchWireGuard(l netlink.Link) (_ *WireGuard, err error) {
	w := &WireGuard{name: l.Attrs().Name, index: l.Attrs().Index, gone: make(chan struct{})}
	if w.asking.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, explain(fmt.Errorf("watch %s: %w", w.name, err))
	}
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		w.asking.handle.Close()
		return nil, explain(fmt.Errorf("watch %s: %w", w.name, err))
	}
	w.watch = &Watcher{socket: socket, done: make(chan struct{})}
	w.watch.stop = func() bool { return true }
	go w.routineLink()
	w.look()
	return w, nil
}

// routineLink takes in what the kernel tells of the device. Close ends it and waits for it.
func (w *WireGuard) routineLink() {
	defer close(w.watch.done)
	for {
		messages, from, err := w.watch.socket.Receive()
		switch {
		case w.watch.closed.Load():
			return
		case errors.Is(err, unix.ENOBUFS):
			w.look() // what was lost may be about this device
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			w.watch.err = fmt.Errorf("watch %s: %w", w.name, err)
			return
		case from.Pid != nl.PidKernel:
			continue // only the kernel's word counts
		}
		for _, m := range messages {
			w.take(m)
		}
	}
}

// take reads one message about a link.
func (w *WireGuard) take(m syscall.NetlinkMessage) {
	if (m.Header.Type != unix.RTM_NEWLINK && m.Header.Type != unix.RTM_DELLINK) || len(m.Data) < unix.SizeofIfInfomsg {
		return
	}
	if info := nl.DeserializeIfInfomsg(m.Data); int(info.Index) == w.index && info.Family == unix.AF_UNSPEC {
		w.set(info.Flags&unix.IFF_UP != 0, m.Header.Type == unix.RTM_DELLINK)
	}
}

// look asks for the state. An error that does not say that the device is gone says nothing.
func (w *WireGuard) look() {
	l, err := w.ask()
	var missing netlink.LinkNotFoundError
	switch {
	case err == nil:
		w.set(l.Attrs().Flags&net.FlagUp != 0, false)
	case errors.As(err, &missing), errors.Is(err, unix.ENODEV):
		w.set(false, true)
	}
}

// ask reads the device in the namespace where it was opened, whichever thread calls.
func (w *WireGuard) ask() (netlink.Link, error) {
	w.asking.Lock()
	defer w.asking.Unlock()
	if w.asking.handle == nil {
		return nil, os.ErrClosed
	}
	return w.asking.handle.LinkByIndex(w.index)
}

func (w *WireGuard) set(up, gone bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.up && !up {
		w.state.downs++
	}
	w.state.up = up
	if gone && !w.state.gone {
		w.state.gone = true
		close(w.gone)
	}
}

// State reports whether the device is up, and how often it went down since it was opened: each time the kernel forgot
// all sessions.
func (w *WireGuard) State() (up bool, downs uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.up, w.state.downs
}

// Refused counts the packets from peers that the kernel dropped after decryption, since the device was made: their source
// was not bound to the peer, or they were no IP packets. The kernel keeps one number for the device and none for a peer.
func (w *WireGuard) Refused() (uint64, error) {
	l, err := w.ask()
	if err != nil {
		return 0, explain(fmt.Errorf("read counters of %s: %w", w.name, err))
	}
	if l.Attrs().Statistics == nil {
		return 0, fmt.Errorf("read counters of %s: the kernel has none", w.name)
	}
	return l.Attrs().Statistics.RxFrameErrors, nil
}

// Done is closed when the device was removed by somebody.
func (w *WireGuard) Done() <-chan struct{} { return w.gone }

// Close ends the watch and leaves the device. It may be called again.
func (w *WireGuard) Close() error {
	err := w.watch.Close()
	w.asking.Lock()
	defer w.asking.Unlock()
	if w.asking.handle != nil {
		w.asking.handle.Close()
		w.asking.handle = nil
	}
	return err
}
