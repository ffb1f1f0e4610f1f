// Package policy is the vocabulary of what may talk to what, and its meaning.
//
// A View is everything one host's judge knows: addresses, workloads, rulesets, the lease. Judge says, in readable Go
// and in numbered steps, what the verdict on a packet is; bpf/judge.c is its twin with the same numbers, and one table
// of cases runs against both. The package owns no state, clock or socket: the connection table and the time are given.
//
// What people write (documents, rules with patterns) is in internal/policydoc; turning it into rulesets is
// coordinator/compile.
//
// Start at judge.go.
package policy
