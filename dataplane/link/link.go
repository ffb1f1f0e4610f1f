package link

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Errors that a caller tells apart.
var (
	// ErrNoInterface: the tunnel device does not exist.
	ErrNoInterface = errors.New("no such interface")
	// ErrSpec: the description is not acceptable.
	ErrSpec = errors.New("invalid link description")
	// ErrConflict: a route of somebody else stands where ours must be.
	ErrConflict = errors.New("route belongs to somebody else")
)

const (
	// routeProtocol marks our routes (RTA_PROTOCOL; 83 is S). Routes with another mark are never changed.
	routeProtocol = 83
	// fallbackMetric is the weakest there is: the fallback answers only when no other route does.
	fallbackMetric = 1<<32 - 1
	// deviceMetric is the metric of the route through the device. It is the strongest that IPv6 has: 0 means 1024 there.
	deviceMetric = 1
	// maxAddresses bounds the addresses of the device; a description with more is refused.
	maxAddresses = 4096
	// maxOverlay bounds the overlay prefixes; a description with more is refused.
	maxOverlay = 64
)

// Spec describes the tunnel device as the network stack should see it.
type Spec struct {
	Interface string
	MTU       int
	// Node are the node's own addresses, at most one of each family. They are the source of traffic to the overlay that
	// has chosen none.
	Node []netip.Addr
	// Addresses are those of all workload instances on this host. They may repeat the node's.
	Addresses []netip.Addr
	// Overlay are the prefixes of the whole overlay, of both families.
	Overlay []netip.Prefix
	// Behind are addresses of workloads in network namespaces of their own, each with the index of the device of this
	// host that leads there. The tunnel device does not have them: each gets a route. A device that is gone, or down,
	// gets none, which is no error: the kernel removes the routes of such a device too.
	Behind map[netip.Addr]int
}

// Apply makes the description real as far as the state of the link permits, in this order:
//  1. unreachable routes for the overlay, so that nothing ever falls to the default route;
//  2. settings of the interface, its MTU and addresses, and the routes to the addresses that lie behind other devices;
//  3. when the link is up, the routes through it. The kernel takes those only then; Up sets them otherwise.
//
// It removes nothing: Prune does.
func Apply(ctx context.Context, s Spec) error {
	if err := errors.Join(ctx.Err(), s.check()); err != nil {
		return err
	}
	for _, p := range s.overlay() {
		if err := ensureRoute(fallbackRoute(p)); err != nil {
			return explain(fmt.Errorf("add unreachable route for %s: %w", p, err))
		}
	}
	l, err := find(s.Interface)
	if err != nil {
		return err
	}
	if err := setSysctls(s.Interface); err != nil {
		return explain(err)
	}
	if l.Attrs().MTU != s.MTU {
		if err := netlink.LinkSetMTU(l, s.MTU); err != nil {
			return explain(fmt.Errorf("set MTU of %s to %d: %w", s.Interface, s.MTU, err))
		}
	}
	if err := ensureAddresses(l, s); err != nil {
		return err
	}
	if err := ensureBehind(s); err != nil {
		return err
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		return nil
	}
	return ensureDeviceRoutes(l, s)
}

// Up sets the link up and then the routes through it. Call it after Apply, and after programs are attached.
func Up(ctx context.Context, s Spec) error {
	if err := errors.Join(ctx.Err(), s.check()); err != nil {
		return err
	}
	l, err := find(s.Interface)
	if err != nil {
		return err
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(l); err != nil {
			return explain(fmt.Errorf("set %s up: %w", s.Interface, err))
		}
	}
	return ensureDeviceRoutes(l, s)
}

// Prune removes addresses of the device and routes of ours that are not in the description.
func Prune(ctx context.Context, s Spec) error {
	if err := errors.Join(ctx.Err(), s.check()); err != nil {
		return err
	}
	l, err := find(s.Interface)
	if err != nil {
		return err
	}
	overlay := s.overlay()
	errs := []error{removeRoutes(s.Interface, func(r netlink.Route) bool {
		return !slices.Contains(overlay, prefixOf(r)) && !s.leadsBehind(r)
	})}
	return errors.Join(append(errs, removeAddresses(l, s.all()))...)
}

// Release removes all addresses of the device and all our routes, the fallback last. It ends the protection against
// leaks, so only a release of the host calls it. A device that is gone is success.
func Release(ctx context.Context, s Spec) error {
	if err := errors.Join(ctx.Err(), checkName(s.Interface)); err != nil {
		return err
	}
	l, err := find(s.Interface)
	if err == nil {
		err = removeAddresses(l, nil)
	} else if errors.Is(err, ErrNoInterface) {
		err = nil
	}
	return errors.Join(err,
		removeRoutes(s.Interface, func(r netlink.Route) bool { return r.Type == unix.RTN_UNICAST }),
		removeRoutes(s.Interface, func(r netlink.Route) bool { return true }))
}

// check refuses descriptions that would touch more than our device or that the kernel cannot hold.
func (s Spec) check() error {
	if err := checkName(s.Interface); err != nil {
		return err
	}
	if s.MTU < 1280 || s.MTU > 65535 {
		return fmt.Errorf("%w: MTU %d is not between 1280 and 65535", ErrSpec, s.MTU)
	}
	if n := len(s.Addresses) + len(s.Node) + len(s.Behind); n > maxAddresses || len(s.Overlay) > maxOverlay {
		return fmt.Errorf("%w: %d addresses and %d overlay prefixes, at most %d and %d are possible", ErrSpec, n, len(s.Overlay), maxAddresses, maxOverlay)
	}
	for _, p := range s.Overlay {
		if !p.IsValid() || p.Bits() == 0 || p.Addr().Is4In6() || p != p.Masked() {
			return fmt.Errorf("%w: overlay prefix %v is not a network", ErrSpec, p)
		}
	}
	for _, a := range slices.Concat(s.Node, s.Addresses, slices.Collect(maps.Keys(s.Behind))) {
		if !slices.ContainsFunc(s.Overlay, func(p netip.Prefix) bool { return a.Zone() == "" && p.Contains(a) }) {
			return fmt.Errorf("%w: address %v is outside the overlay %v", ErrSpec, a, s.Overlay)
		}
	}
	if len(s.Node) > 2 || len(s.Node) == 2 && s.Node[0].Is4() == s.Node[1].Is4() {
		return fmt.Errorf("%w: the node has addresses %v, at most one of each family is possible", ErrSpec, s.Node)
	}
	for a, index := range s.Behind {
		if index <= 0 || slices.Contains(s.Node, a) || slices.Contains(s.Addresses, a) {
			return fmt.Errorf("%w: address %v is behind device %d and is this host's as well", ErrSpec, a, index)
		}
	}
	return nil
}

// checkName keeps path tricks and the names that mean every interface out of /proc/sys.
func checkName(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "/:% \t\n\v\f\r\x00") || slices.Contains([]string{".", "..", "all", "default", "lo"}, name) {
		return fmt.Errorf("%w: interface name %q is not possible", ErrSpec, name)
	}
	return nil
}

// all are the device's addresses: the node's first, without repetition, of the families that the kernel has.
func (s Spec) all() []netip.Addr {
	var out []netip.Addr
	for _, a := range slices.Concat(s.Node, s.Addresses) {
		if !slices.Contains(out, a) && (a.Is4() || haveIPv6()) {
			out = append(out, a)
		}
	}
	return out
}

// overlay are the prefixes of the families that the kernel has.
func (s Spec) overlay() []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(s.Overlay), func(p netip.Prefix) bool { return p.Addr().Is6() && !haveIPv6() })
}

// haveIPv6: a kernel that was started with ipv6.disable=1 has no such folder. It can then leak no IPv6 either, so that
// half of a description is left out.
func haveIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6/conf")
	return err == nil
}

func find(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, fmt.Errorf("%w: %s: the tunnel has to be opened first", ErrNoInterface, name)
	}
	if err != nil {
		return nil, explain(fmt.Errorf("look up interface %s: %w", name, err))
	}
	return l, nil
}

// sysctls of the tunnel device. Each keeps the kernel from giving the device an address that nobody bound, or from
// taking one away.
var sysctls = []struct{ name, value string }{
	{"disable_ipv6", "0"},         // the host's default for new devices may be 1
	{"addr_gen_mode", "1"},        // no link-local address
	{"accept_ra", "0"},            // no addresses or routes from router advertisements
	{"autoconf", "0"},             //
	{"use_tempaddr", "0"},         // no random ones
	{"keep_addr_on_down", "1"},    // bound addresses outlive a link flap
	{"ndisc_notify", "0"},         // nobody to tell
	{"router_solicitations", "0"}, // nobody to ask
}

// setSysctls writes only what differs. /proc/sys/net shows the namespace of the calling thread.
func setSysctls(name string) error {
	if !haveIPv6() {
		return nil
	}
	for _, c := range sysctls {
		path := filepath.Join("/proc/sys/net/ipv6/conf", name, c.name)
		old, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without that setting has not its effect either
		}
		if err == nil && strings.TrimSpace(string(old)) != c.value {
			err = os.WriteFile(path, []byte(c.value), 0)
		}
		if err != nil {
			return fmt.Errorf("set %s to %s: %w", path, c.value, err)
		}
	}
	return nil
}

// explain adds what the operator can do about an error of the kernel.
func explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: /proc/sys is mounted read-only; a container needs it writable", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: CAP_NET_ADMIN is needed, run signetd as root", err)
	default:
		return err
	}
}
