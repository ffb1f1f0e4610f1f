// Package enforce makes a policy.View real in the kernel and tells what the kernel decided.
//
// It owns the pinned maps and links below one bpffs directory: loading the programs of package bpf, attaching them,
// writing views as whole generations, and reading events, counters and tracked connections. It does not own devices,
// addresses or routes (dataplane/link), nor what a view contains (agent/reconcile).
//
// Everything is pinned: closing an Enforcer, or killing its process, leaves enforcement as it was, and the next Open
// takes it over by one atomic update of each link. Only Release takes it away.
//
// Start at enforcer.go, then write.go for how a view becomes a generation.
package enforce
