package link

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fallbackRoute answers "host unreachable" at once for what no better route takes.
func fallbackRoute(p netip.Prefix) netlink.Route {
	return netlink.Route{
		Dst: ipNet(p), Type: unix.RTN_UNREACHABLE, Table: unix.RT_TABLE_MAIN, Priority: fallbackMetric, Protocol: routeProtocol,
	}
}

// deviceRoute sends an overlay prefix into the tunnel. The preferred source keeps the kernel from choosing any of the
// workloads' addresses: by the rules of IPv6 it would take the one that looks most like the destination.
func deviceRoute(l netlink.Link, p netip.Prefix, node []netip.Addr) netlink.Route {
	r := netlink.Route{
		LinkIndex: l.Attrs().Index, Dst: ipNet(p), Type: unix.RTN_UNICAST, Table: unix.RT_TABLE_MAIN, Priority: deviceMetric, Protocol: routeProtocol,
	}
	if p.Addr().Is4() {
		r.Scope = unix.RT_SCOPE_LINK // IPv6 routes have no scope
	}
	for _, a := range node {
		if a.Is4() == p.Addr().Is4() {
			r.Src = a.AsSlice()
		}
	}
	return r
}

func ensureDeviceRoutes(l netlink.Link, s Spec) error {
	for _, p := range s.overlay() {
		if err := ensureRoute(deviceRoute(l, p, s.Node)); err != nil {
			return explain(fmt.Errorf("add route for %s through %s: %w", p, s.Interface, err))
		}
	}
	return nil
}

// ensureRoute adds a route, or corrects ours of the same prefix and metric. It refuses to replace somebody else's.
func ensureRoute(want netlink.Route) error {
	have, err := mainRoutes(family(prefixOf(want)))
	if err != nil {
		return err
	}
	for _, h := range have {
		if prefixOf(h) != prefixOf(want) || h.Priority != want.Priority {
			continue
		}
		if h.Protocol != routeProtocol {
			return fmt.Errorf("%w: %s; remove it with ip route del, or choose another overlay range", ErrConflict, describeRoute(h))
		}
		if sameRoute(h, want) {
			return nil
		}
		if err := deleteRoute(h); err != nil {
			return err
		}
	}
	return netlink.RouteAdd(&want)
}

// sameRoute compares what we set. The kernel puts unreachable IPv6 routes on the loopback device.
func sameRoute(have, want netlink.Route) bool {
	return have.Type == want.Type && have.Src.Equal(want.Src) && len(have.MultiPath) == 0 && have.Gw == nil &&
		(have.LinkIndex == want.LinkIndex || want.Type == unix.RTN_UNREACHABLE)
}

// removeRoutes removes those of our routes that match: the fallbacks, and what leads through the device or nowhere.
func removeRoutes(name string, match func(netlink.Route) bool) error {
	var errs []error
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		have, err := mainRoutes(f)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, h := range have {
			if h.Protocol == routeProtocol && match(h) {
				if err := deleteRoute(h); err != nil {
					errs = append(errs, explain(fmt.Errorf("remove %s of %s: %w", describeRoute(h), name, err)))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func deleteRoute(r netlink.Route) error {
	r.Flags = 0 // what the kernel reports of the link's state is no part of the key
	if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

func mainRoutes(family int) ([]netlink.Route, error) {
	all, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, explain(fmt.Errorf("list routes: %w", err))
	}
	return all, nil
}

// prefixOf is a route's destination; the default route is all zeros.
func prefixOf(r netlink.Route) netip.Prefix {
	if p := toPrefix(r.Dst); p.IsValid() {
		return p
	}
	if r.Family == unix.AF_INET6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// denying are the types of routes that take a packet nowhere.
var denying = []int{unix.RTN_UNREACHABLE, unix.RTN_BLACKHOLE, unix.RTN_PROHIBIT, unix.RTN_THROW}

func describeRoute(r netlink.Route) string {
	text := fmt.Sprintf("route %s", prefixOf(r))
	if slices.Contains(denying, r.Type) {
		return fmt.Sprintf("denying %s in table %d", text, r.Table)
	}
	return fmt.Sprintf("%s through %s in table %d", text, linkName(r), r.Table)
}

// linkName names a route's device; empty when it has none or it is gone.
func linkName(r netlink.Route) string {
	index := r.LinkIndex
	if index == 0 && len(r.MultiPath) > 0 {
		index = r.MultiPath[0].LinkIndex
	}
	if index == 0 {
		return ""
	}
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return fmt.Sprintf("interface %d", index)
	}
	return l.Attrs().Name
}
