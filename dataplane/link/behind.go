package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// behindRoute sends one address of a workload to the device that leads to it. The preferred source is that of
// deviceRoute, for the same reason: what the kernel itself sends there comes from the node.
func behindRoute(l netlink.Link, a netip.Addr, node []netip.Addr) netlink.Route {
	return deviceRoute(l, netip.PrefixFrom(a, a.BitLen()), node)
}

// behindRoutes are those that should be there now: of the devices that exist and are up, and the families that the
// kernel has.
func behindRoutes(s Spec) ([]netlink.Route, error) {
	devices := map[int]netlink.Link{}
	for _, index := range s.Behind {
		if _, known := devices[index]; known {
			continue
		}
		l, err := netlink.LinkByIndex(index)
		var missing netlink.LinkNotFoundError
		if err != nil && !errors.As(err, &missing) {
			return nil, explain(fmt.Errorf("look up device %d: %w", index, err))
		}
		if err == nil && l.Attrs().Flags&net.FlagUp != 0 {
			devices[index] = l
		}
	}
	var out []netlink.Route
	for a, index := range s.Behind {
		if l := devices[index]; l != nil && (a.Is4() || haveIPv6()) {
			out = append(out, behindRoute(l, a, s.Node))
		}
	}
	slices.SortFunc(out, func(a, b netlink.Route) int { return prefixOf(a).Addr().Compare(prefixOf(b).Addr()) })
	return out, nil
}

func ensureBehind(s Spec) error {
	routes, err := behindRoutes(s)
	if err != nil {
		return err
	}
	for _, r := range routes {
		err := ensureRoute(r)
		// The device went, or went down, since it was looked up.
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENETDOWN) {
			return explain(fmt.Errorf("add %s: %w", describeRoute(r), err))
		}
	}
	return nil
}

// leadsBehind reports whether the description has a route.
func (s Spec) leadsBehind(r netlink.Route) bool {
	p := prefixOf(r)
	index, ok := s.Behind[p.Addr()]
	return ok && p.IsSingleIP() && index == r.LinkIndex
}

// Forwarding names, each with its name for sysctl -w, the settings that keep this host from forwarding packets to and
// from workloads in network namespaces of their own; empty where it forwards. It changes none: whether a host is a
// router is its operator's decision.
func Forwarding() []string {
	var off []string
	for _, name := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		now, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err == nil && strings.TrimSpace(string(now)) == "0" {
			off = append(off, name)
		}
	}
	return off
}
