// Package tunnel carries overlay packets between hosts, encrypted by WireGuard.
//
// Two engines do that in the same way: Kernel drives the kernel's WireGuard, Userspace is one inside this process, on a
// TUN device. The package owns the engine with its peers and the choice of the underlay address that a peer is tried
// at, and is the only importer of wireguard-go and wgctrl. The TUN device is made here; the kernel's WireGuard device
// by package link, which the caller hands in. Either is kept by the kernel when the agent dies. The package owns no
// address, no route and no link state: package link sets those, and it alone sets the device up, after the programs
// that judge packets are attached. Nothing here knows identities or rules.
//
// An inner packet that arrives from a peer with a source that is not bound to that peer is dropped by WireGuard's
// cryptokey routing before any hook sees it: Userspace counts it for each peer, the kernel for the device. A packet that
// leaves by the device with a source that is not this host's own is dropped by guard.go: an AF_PACKET socket with
// PACKET_QDISC_BYPASS reaches the device without passing any tc program. The kernel's engine has no such second check.
//
// Start at tunnel.go; the engines are in userspace.go and kernel.go, the choice of endpoints (pure) in path.go.
package tunnel
