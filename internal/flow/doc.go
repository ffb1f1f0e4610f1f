// Package flow is the vocabulary of what happened: tuples, verdicts with their reasons, and the canonical flow record.
//
// A verdict never travels without a Reason. The table of reasons is one: the judge in Go, the judge in BPF, explain,
// records and docs all use it (reason.go; the C side is generated from it).
package flow
