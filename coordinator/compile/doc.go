// Package compile turns a policy document and the registry into what the hosts' judges look up, and answers questions
// about it. It is pure: a State goes in, values come out; it owns no store, clock or goroutine.
//
// It does not parse (internal/policydoc), place workloads or give out numbers (coordinator/registry), or send anything
// (coordinator/publish). What a compiled ruleset means is policy.Lookup, which explain and the document's own tests use
// too, so that they cannot disagree with the kernel's twin.
//
// Start at compile.go; then view.go (what one node must know), explain.go and candidate.go (documents that are not
// applied yet).
package compile
