// Package revoke ends the sockets of flows that policy has taken back, so that applications learn at once (ECONNABORTED)
// instead of waiting out a timeout. It denies nothing: the packets of such flows are dropped by the judge in any case
// (dataplane/enforce), and a socket that is missed here only learns later.
//
// There are two ways, and Open finds out which one this host has:
//
//   - bpf_sock_destroy (Linux 6.5): iterators in the kernel visit every socket and decide by the judge's own code and maps
//     (bpf/revoke.c).
//   - SOCK_DESTROY (Linux 4.9): sockets are listed over netlink, a Judge in Go decides, and each is destroyed by a message.
//
// What is visited: TCP connections, also those being opened, and connected UDP sockets, whose local or remote address is
// the overlay's. Listeners, unconnected UDP sockets, ping and raw sockets, and everything without an overlay address are
// left alone. A connection that its application closed already is left alone too.
//
// Both ways see one network namespace: that of the thread that calls. Open remembers it, and Sweep refuses to run in
// another one, since it would find nothing and say that all is well. Workloads with a namespace of their own are judged at
// their veth and learn by their timeouts.
//
// What is not reached: where both ends speak MPTCP the kernel ends the path and keeps the connection for
// net.mptcp.close_timeout (60 s), in case another path comes up. Whose socket it is (the judge's step 5) is not asked, and
// neither is what a workload does outside the overlay.
//
// Sweep belongs after each change of the View in force, and at Due.
//
// Start at revoke.go; judge.go says what is decided, diag.go and wire.go speak netlink.
package revoke
