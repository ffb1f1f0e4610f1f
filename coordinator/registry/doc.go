// Package registry owns who is in the mesh and where: nodes and their keys, join tokens, the applied policy, and from
// both the placement of workloads on nodes with stable addresses.
//
// Every change is one store transaction, written together with its line of the audit log. Readers get State, an
// immutable value behind an atomic pointer, and a one-slot wake-up when it changed in a way that others see. The
// registry issues no certificates (coordinator/authority) and compiles no rules (coordinator/compile).
//
// Start at state.go (what readers see), then enrol.go (how a host gets in) and place.go (pure: who runs where).
package registry
