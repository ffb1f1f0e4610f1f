package link

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxConflicts bounds the answer of Overlaps; a host with more of them has the wrong overlay range anyway.
const maxConflicts = 100

// Conflict is something of this host that lies in an overlay prefix.
type Conflict struct {
	Overlay netip.Prefix // the prefix of ours
	Culprit netip.Prefix // the address (with its prefix) or route
	Kind    string       // "address" or "route"
	Device  string       // empty for a route without one
	Table   int          // of a route
}

// String says it in one sentence.
func (c Conflict) String() string {
	where := ""
	if c.Device != "" {
		where = " on " + c.Device
	}
	if c.Kind == "route" {
		where += fmt.Sprintf(" in routing table %d", c.Table)
	}
	return fmt.Sprintf("overlay range %s overlaps %s %s%s: choose another range with the coordinator's overlay setting", c.Overlay, c.Kind, c.Culprit, where)
}

// Overlaps finds addresses and routes of this host that overlap the overlay prefixes, in all routing tables but the
// local one. It passes over the ignored interface, routes of ours, the default route, and the two halves of everything
// that VPN clients use as one.
func Overlaps(prefixes []netip.Prefix, ignoreInterface string) ([]Conflict, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, explain(fmt.Errorf("list interfaces: %w", err))
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	out, err := addressOverlaps(prefixes, ignoreInterface, names)
	if err != nil {
		return nil, err
	}
	routes, err := routeOverlaps(prefixes, ignoreInterface, names)
	if err != nil {
		return nil, err
	}
	out = append(out, routes...)
	return out[:min(len(out), maxConflicts)], nil
}

func addressOverlaps(prefixes []netip.Prefix, ignore string, names map[int]string) ([]Conflict, error) {
	addrs, err := addresses(nil)
	if err != nil {
		return nil, err
	}
	var out []Conflict
	for _, a := range addrs {
		culprit := toPrefix(a.IPNet)
		if name := names[a.LinkIndex]; name != ignore && culprit.IsValid() {
			for _, p := range prefixes {
				if p.Overlaps(culprit) {
					out = append(out, Conflict{Overlay: p, Culprit: culprit, Kind: "address", Device: name})
				}
			}
		}
	}
	return out, nil
}

func routeOverlaps(prefixes []netip.Prefix, ignore string, names map[int]string) ([]Conflict, error) {
	var out []Conflict
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, explain(fmt.Errorf("list routes: %w", err))
		}
		for _, r := range routes {
			name := names[r.LinkIndex]
			if r.LinkIndex == 0 {
				name = linkName(r)
			}
			if r.Table == unix.RT_TABLE_LOCAL || r.Protocol == routeProtocol || name != "" && name == ignore {
				continue
			}
			for _, p := range prefixes {
				if captures(r, p) {
					out = append(out, Conflict{Overlay: p, Culprit: prefixOf(r), Kind: "route", Device: name, Table: r.Table})
				}
			}
		}
	}
	return out, nil
}

// captures reports whether a route is in the way of an overlay prefix. A route that leads somewhere is, when the two
// have any address in common: hosts are reachable there. A denying route is only when it is at least as specific.
func captures(r netlink.Route, overlay netip.Prefix) bool {
	p := prefixOf(r)
	if p.Bits() <= 1 || !p.Overlaps(overlay) {
		return false
	}
	return !slices.Contains(denying, r.Type) || p.Bits() >= overlay.Bits()
}
