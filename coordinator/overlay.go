package coordinator

import (
	"fmt"
	"net"
	"net/netip"
)

const (
	// minPool4Bits and maxPool4Bits bound the IPv4 range: nodes and workloads share it, and addresses rest for a day.
	minPool4Bits = 8
	maxPool4Bits = 24
	maxPool6Bits = 64
)

func parsePool4(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() {
		return p, fmt.Errorf("%.70q is not an IPv4 range, expected for example %s", s, DefaultPool4)
	}
	if p.Bits() < minPool4Bits || p.Bits() > maxPool4Bits {
		return p, fmt.Errorf("range %s is too large or too small, expected /%d to /%d", p, minPool4Bits, maxPool4Bits)
	}
	return p, checkPool(p)
}

func parsePool6(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is6() || p.Addr().Is4In6() {
		return p, fmt.Errorf("%.70q is not an IPv6 range, expected %q or for example fd12:3456:789a::/48", s, ipv6Auto)
	}
	if p.Bits() < 32 || p.Bits() > maxPool6Bits {
		return p, fmt.Errorf("range %s is too large or too small, expected /32 to /%d", p, maxPool6Bits)
	}
	return p, checkPool(p)
}

// reserved are the ranges that no host would use as unicast addresses of others.
func reserved() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
		netip.MustParsePrefix("224.0.0.0/3"), // multicast and above
		netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
	}
}

// tailscale is the range that its filter takes for its own: on a host that runs it, packets of that range that come by
// another device are dropped (contract, section 1).
var tailscale = netip.MustParsePrefix("100.64.0.0/10")

func checkPool(p netip.Prefix) error {
	if p != p.Masked() {
		return fmt.Errorf("range %s has host bits set, did you mean %s?", p, p.Masked())
	}
	if p.Overlaps(tailscale) {
		return fmt.Errorf("range %s overlaps %s: on a host with Tailscale, its filter drops what comes from there by another device; use for example %s", p, tailscale, DefaultPool4)
	}
	for _, r := range reserved() {
		if p.Overlaps(r) {
			return fmt.Errorf("range %s overlaps %s, which is loopback, link-local, multicast or reserved; use for example %s", p, r, DefaultPool4)
		}
	}
	return nil
}

// ownNetworks lists the networks of this host's addresses and routes. Signet's own device does not count.
func ownNetworks() (map[netip.Prefix]string, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	out := map[netip.Prefix]string{}
	for _, i := range ifs {
		if i.Name == ownDevice {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", i.Name, err)
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				out[p.Masked()] = i.Name
			}
		}
	}
	return out, addRoutes(out)
}

// checkOverlap refuses a range that this host reaches in another way, and names the culprit.
func checkOverlap(pool netip.Prefix, networks map[netip.Prefix]string) error {
	for n, dev := range networks {
		if pool.Overlaps(n) {
			return fmt.Errorf("range %s overlaps %s on %s of this host: choose another with --ipv4-pool", pool, n, dev)
		}
	}
	return nil
}
