package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpTries: the kernel says when a table changed while it was read. On a host whose tables never rest, the last answer
// is taken as it is; the next round of reconciliation sees what it missed.
const dumpTries = 5

// dump reads a table again until it was read in one piece.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpTries {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil
}

// ensureAddresses adds the addresses that are missing, each for itself alone: /32 or /128, without a prefix route. An
// IPv6 address is usable at once, because nobody on the tunnel could own it too.
func ensureAddresses(l netlink.Link, s Spec) error {
	have, err := addresses(l)
	if err != nil {
		return err
	}
	for _, a := range s.all() {
		if slices.ContainsFunc(have, func(h netlink.Addr) bool { return hostAddr(h) == a }) {
			continue
		}
		add := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NOPREFIXROUTE}
		if a.Is6() {
			add.Flags |= unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, add); err != nil && !errors.Is(err, unix.EEXIST) {
			return explain(fmt.Errorf("add address %s to %s: %w", a, l.Attrs().Name, err))
		}
	}
	return nil
}

// removeAddresses removes all addresses of the device but keep.
func removeAddresses(l netlink.Link, keep []netip.Addr) error {
	have, err := addresses(l)
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range have {
		if a := hostAddr(h); a.IsValid() && slices.Contains(keep, a) {
			continue
		}
		if err := netlink.AddrDel(l, &netlink.Addr{IPNet: h.IPNet, Peer: h.Peer}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, explain(fmt.Errorf("remove address %s from %s: %w", h.IPNet, l.Attrs().Name, err)))
		}
	}
	return errors.Join(errs...)
}

func addresses(l netlink.Link) ([]netlink.Addr, error) {
	have, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, explain(fmt.Errorf("list addresses: %w", err))
	}
	return have, nil
}

// hostAddr is the address of an entry that covers a single address; invalid for one with a wider prefix, which is
// never one of ours.
func hostAddr(a netlink.Addr) netip.Addr {
	p := toPrefix(a.IPNet)
	if !p.IsValid() || !p.IsSingleIP() {
		return netip.Addr{}
	}
	return p.Addr()
}

// toPrefix keeps the address bits; invalid for nil.
func toPrefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	bits, size := n.Mask.Size()
	if size == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, bits)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
