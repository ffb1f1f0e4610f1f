package link

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxCandidates bounds what a host advertises; addresses beyond it, on its less likely interfaces, are left out.
const maxCandidates = 16

// Exclude names what is no underlay.
type Exclude struct {
	Interfaces []string       // the tunnel device
	Prefixes   []netip.Prefix // the overlay
}

// Info is a network interface.
type Info struct {
	Index    int
	Name     string
	Kind     string // as ip -d link shows it: device, veth, tun, bridge ...
	Loopback bool
	Up       bool
	MTU      int
}

// Links lists the interfaces, ordered by index.
func Links() ([]Info, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, explain(fmt.Errorf("list interfaces: %w", err))
	}
	out := make([]Info, 0, len(links))
	for _, l := range links {
		a := l.Attrs()
		kind := l.Type()
		if _, ok := l.(*netlink.Tuntap); ok {
			kind = "tun"
		}
		out = append(out, Info{
			Index: a.Index, Name: a.Name, Kind: kind, Loopback: a.Flags&net.FlagLoopback != 0, Up: a.Flags&net.FlagUp != 0, MTU: a.MTU,
		})
	}
	slices.SortFunc(out, func(a, b Info) int { return cmp.Compare(a.Index, b.Index) })
	return out, nil
}

// Candidates lists this host's underlay addresses at which peers may reach the WireGuard port. Addresses of interfaces
// that carry a default route come first, then by interface.
func Candidates(listenPort int, exclude Exclude) ([]netip.AddrPort, error) {
	if listenPort < 1 || listenPort > 65535 {
		return nil, fmt.Errorf("%w: listen port %d is not between 1 and 65535", ErrSpec, listenPort)
	}
	links, err := Links()
	if err != nil {
		return nil, err
	}
	preferred, err := defaultLinks()
	if err != nil {
		return nil, err
	}
	addrs, err := addresses(nil)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(links, func(a, b Info) int { return cmp.Compare(rank(preferred, a), rank(preferred, b)) })
	var out []netip.AddrPort
	for _, l := range links {
		if !l.Up || l.Loopback || slices.Contains(exclude.Interfaces, l.Name) {
			continue
		}
		for _, a := range addrs {
			ep := netip.AddrPortFrom(toPrefix(a.IPNet).Addr(), uint16(listenPort))
			if a.LinkIndex == l.Index && isUnderlay(a, exclude.Prefixes) && !slices.Contains(out, ep) {
				out = append(out, ep)
			}
		}
	}
	return out[:min(len(out), maxCandidates)], nil
}

func rank(preferred map[int]bool, l Info) int {
	if preferred[l.Index] {
		return 0
	}
	return 1
}

// isUnderlay keeps addresses that others can reach for a while: no link-local ones, none that the kernel has not
// confirmed, is about to give up or changes every day.
func isUnderlay(a netlink.Addr, overlay []netip.Prefix) bool {
	const passing = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY
	addr := toPrefix(a.IPNet).Addr()
	return addr.IsValid() && addr.IsGlobalUnicast() && a.Flags&passing == 0 && // IsGlobalUnicast includes private ranges
		!slices.ContainsFunc(overlay, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// defaultLinks are the interfaces that carry a default route of the main table.
func defaultLinks() (map[int]bool, error) {
	out := make(map[int]bool)
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := mainRoutes(f)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			if prefixOf(r).Bits() != 0 || slices.Contains(denying, r.Type) {
				continue
			}
			out[r.LinkIndex] = true
			for _, hop := range r.MultiPath {
				out[hop.LinkIndex] = true
			}
		}
	}
	return out, nil
}
