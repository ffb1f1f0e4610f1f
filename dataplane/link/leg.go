package link

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// NoSpace is the Space of a device whose other end, if it has one, is in this network namespace.
const NoSpace = -1

// Leg is a network device of this host, with what tells whether it leads into another network namespace.
type Leg struct {
	Index    int
	Name     string
	Kind     string // as ip -d link shows it: veth, netkit, device, bridge ...
	Space    int    // number that this namespace gives to the one of the other end (IFLA_LINK_NETNSID), or NoSpace
	Master   string // bridge or bond that it is a port of; empty for none
	Loopback bool
	Default  bool // a default route of the main table leads through it
}

// Legs lists the devices of the calling thread's network namespace, in the kernel's order.
func Legs() ([]Leg, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, explain(fmt.Errorf("list devices: %w", err))
	}
	defaults, err := defaultLinks()
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	out := make([]Leg, 0, len(links))
	for _, l := range links {
		a := l.Attrs()
		leg := Leg{Index: a.Index, Name: a.Name, Kind: l.Type(), Space: NoSpace, Loopback: a.Flags&net.FlagLoopback != 0, Default: defaults[a.Index]}
		if a.NetNsID >= 0 {
			leg.Space = a.NetNsID
		}
		if a.MasterIndex != 0 {
			leg.Master = names[a.MasterIndex]
		}
		out = append(out, leg)
	}
	return out, nil
}

// SpaceOf is the number that the calling thread's network namespace gives to the one that fd is open on (/proc/PID/ns/net),
// or NoSpace where it has none: no device here leads there. Legs gives numbers out, so call it before; the number is good
// while fd is open.
func SpaceOf(fd int) (int, error) {
	id, err := netlink.GetNetNsIdByFd(fd)
	if err != nil {
		return NoSpace, explain(fmt.Errorf("number a network namespace: %w", err))
	}
	return id, nil
}
