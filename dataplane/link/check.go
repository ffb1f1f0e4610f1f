package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Differences names, in words, what on this host is not as the description says, and what stands in its place. It
// changes nothing. A host as Apply, Up and Prune leave it has none.
func Differences(ctx context.Context, s Spec) ([]string, error) {
	if err := errors.Join(ctx.Err(), s.check()); err != nil {
		return nil, err
	}
	var out []string
	routes := map[int][]netlink.Route{}
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := mainRoutes(f)
		if err != nil {
			return nil, err
		}
		routes[f] = all
	}
	for _, p := range s.overlay() {
		out = append(out, routeDifference(routes[family(p)], fallbackRoute(p))...)
	}
	behind, err := behindRoutes(s)
	if err != nil {
		return nil, err
	}
	for _, r := range behind {
		// One that is missing is put in without a word: its device may just have come up.
		have := routes[family(prefixOf(r))]
		if slices.ContainsFunc(have, func(h netlink.Route) bool { return prefixOf(h) == prefixOf(r) && h.Priority == r.Priority }) {
			out = append(out, routeDifference(have, r)...)
		}
	}
	l, err := find(s.Interface)
	if errors.Is(err, ErrNoInterface) {
		return append(out, "device "+s.Interface+" is gone"), nil
	}
	if err != nil {
		return nil, err
	}
	if l.Attrs().MTU != s.MTU {
		out = append(out, fmt.Sprintf("the MTU of %s was set to %d", s.Interface, l.Attrs().MTU))
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		out = append(out, s.Interface+" was set down")
	}
	out = append(out, sysctlDifferences(s.Interface)...)
	have, err := addresses(l)
	if err != nil {
		return nil, err
	}
	out = append(out, addressDifferences(s, have)...)
	for _, p := range s.overlay() {
		out = append(out, routeDifference(routes[family(p)], deviceRoute(l, p, s.Node))...)
	}
	return out, nil
}

func addressDifferences(s Spec, have []netlink.Addr) (out []string) {
	want := s.all()
	for _, a := range want {
		if !slices.ContainsFunc(have, func(h netlink.Addr) bool { return hostAddr(h) == a }) {
			out = append(out, fmt.Sprintf("address %s of %s is gone", a, s.Interface))
		}
	}
	for _, h := range have {
		if a := hostAddr(h); !a.IsValid() || !slices.Contains(want, a) {
			out = append(out, fmt.Sprintf("address %s was added to %s", h.IPNet, s.Interface))
		}
	}
	return out
}

// routeDifference compares one route of ours with what stands at its prefix and metric.
func routeDifference(have []netlink.Route, want netlink.Route) []string {
	what := describeRoute(want)
	for _, h := range have {
		if prefixOf(h) != prefixOf(want) || h.Priority != want.Priority {
			continue
		}
		switch {
		case h.Protocol != routeProtocol:
			return []string{fmt.Sprintf("the %s is gone, and in its place is the %s, made by %s", what, describeRoute(h), maker(h.Protocol))}
		case !sameRoute(h, want):
			return []string{fmt.Sprintf("the %s was changed to the %s", what, describeRoute(h))}
		}
		return nil
	}
	return []string{"the " + what + " is gone"}
}

// maker is who marks routes with a number, by the kernel's list of them.
func maker(p netlink.RouteProtocol) string {
	names := map[netlink.RouteProtocol]string{
		unix.RTPROT_REDIRECT: "an ICMP redirect", unix.RTPROT_KERNEL: "the kernel", unix.RTPROT_BOOT: "a command without a mark",
		unix.RTPROT_STATIC: "an administrator", unix.RTPROT_RA: "a router advertisement", unix.RTPROT_DHCP: "a DHCP client",
		unix.RTPROT_ZEBRA: "zebra", unix.RTPROT_BIRD: "bird", unix.RTPROT_BGP: "BGP", unix.RTPROT_OSPF: "OSPF",
	}
	if name := names[p]; name != "" {
		return name
	}
	return fmt.Sprintf("protocol %d", p)
}

// sysctlDifferences reads what setSysctls would write. What cannot be read has no effect either.
func sysctlDifferences(name string) (out []string) {
	if !haveIPv6() {
		return nil
	}
	for _, c := range sysctls {
		now, err := os.ReadFile(filepath.Join("/proc/sys/net/ipv6/conf", name, c.name))
		if value := strings.TrimSpace(string(now)); err == nil && value != c.value {
			out = append(out, fmt.Sprintf("%s of %s was set to %s", c.name, name, value))
		}
	}
	return out
}
