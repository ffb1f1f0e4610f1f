// Package agent is signetd: it wires the parts below it together, and starts and stops them in order.
//
// The order of a start: configuration, state, local API, identity (enrol where there is none), the snapshot from disk,
// the dataplane, one pass of the reconciler, and then the coordinator: a host whose coordinator is away comes back from
// what it holds. On the way down everything ends but enforcement: programs, pins, routes and the device stay.
//
// Start at Agent.Run (agent.go); what the session asks of the host is in host.go; what operators ask is in control.go
// and status.go.
package agent
