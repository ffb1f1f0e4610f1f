// Package link sets what the host's network stack must know of the overlay: the tunnel device's addresses, routes, MTU
// and state, and the routes that keep overlay traffic from falling to the default route when the device is gone.
//
// It is the only importer of netlink in the product. It changes only what belongs to the tunnel device and the routes
// marked with its own routing protocol number; it reads everything else, to find overlaps, candidates for WireGuard
// endpoints, and changes. Of devices it makes only the kernel's WireGuard device (wireguard.go; package tunnel makes the
// TUN device, and drives both), and it judges no packet.
//
// All functions work in the network namespace of the calling thread. Each may be repeated: what is already as it
// should be is not touched.
//
// Start at link.go; behind.go has the routes to workloads in network namespaces of their own; leg.go, overlap.go and
// candidates.go only read; watch.go reports changes.
package link
