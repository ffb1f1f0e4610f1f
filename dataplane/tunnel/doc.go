// Package tunnel carries overlay packets between hosts, encrypted by WireGuard.
//
// It owns the tunnel device (created here, kept by the kernel when the agent dies), the WireGuard engine with its
// peers, and the choice of the underlay address that a peer is tried at. It is the only importer of wireguard-go. It
// owns no address, no route and no link state: package link sets those, and it alone sets the device up, after the
// programs that judge packets are attached. Nothing here knows identities or rules.
//
// Two checks are made here because nothing in the kernel can make them. An inner packet that arrives from a peer with
// a source that is not bound to that peer is dropped by WireGuard's cryptokey routing before any hook sees it: it is
// counted for each peer. A packet that leaves by the device with a source that is not this host's own is dropped by
// guard.go: an AF_PACKET socket with PACKET_QDISC_BYPASS reaches the device without passing any tc program.
//
// Start at tunnel.go; the engine is in userspace.go, the choice of endpoints (pure) in path.go.
package tunnel
