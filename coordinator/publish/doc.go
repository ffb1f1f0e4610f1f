// Package publish turns the registry's state and compiled policy into what each agent should hold: content-addressed
// sections and a signed manifest for each node, behind an atomic pointer.
//
// One goroutine writes. It owns the lease windows, the epoch and the encoding cache: a section is encoded and signed
// once for each change of its content, whoever receives it. It does not know streams or agents: coordinator/session
// reads what is published and sends differences.
//
// The core is pure. Start at build.go (state and views to values), then lease.go (windows), encode.go (values to
// bytes, once) and publish.go (the writer).
package publish
