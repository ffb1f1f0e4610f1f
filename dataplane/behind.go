package dataplane

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/signet-overlay/signet/dataplane/link"
)

// errNoHost: routes were given to a host that has no addresses yet.
var errNoHost = errors.New("the host's own addresses must be set before routes to workloads")

// UpdateRoutes makes these the routes to workloads in network namespaces of their own: each address with the index of the
// device of this host that leads to it. Call it after UpdateHost, whose addresses it must not repeat.
func (d *Dataplane) UpdateRoutes(ctx context.Context, behind map[netip.Addr]uint32) error {
	d.host.mu.Lock()
	defer d.host.mu.Unlock()
	if d.host.spec.Interface == "" {
		if len(behind) == 0 {
			return nil
		}
		return errNoHost
	}
	spec := d.host.spec
	spec.Behind = make(map[netip.Addr]int, len(behind))
	for a, index := range behind {
		spec.Behind[a] = int(index)
	}
	if err := d.applyHost(ctx, spec); err != nil {
		return err
	}
	d.host.spec = spec
	return nil
}

// ownAddresses are those that this host sends from by the tunnel: its own, and those of workloads behind other devices.
func ownAddresses(spec link.Spec) []netip.Addr {
	return slices.AppendSeq(slices.Concat(spec.Node, spec.Addresses), maps.Keys(spec.Behind))
}

// withoutOwn leaves out the addresses that the host itself has now.
func withoutOwn(behind map[netip.Addr]int, spec link.Spec) map[netip.Addr]int {
	out := maps.Clone(behind)
	for _, a := range spec.Node {
		delete(out, a)
	}
	for _, a := range spec.Addresses {
		delete(out, a)
	}
	return out
}

// behindWarnings says what keeps packets from workloads in network namespaces of their own.
func behindWarnings(spec link.Spec) (out []string) {
	if len(spec.Behind) == 0 {
		return nil
	}
	for _, name := range link.Forwarding() {
		out = append(out, name+" is 0, so that packets of workloads in network namespaces of their own do not pass this host in that family: sysctl -w "+name+"=1")
	}
	return out
}
