// Package mesh is the vocabulary of what an agent should make real: Bindings, Peers, Snapshots and their differences.
//
// These are plain values. How they are written on the wire and how signatures are checked is proto/codec: a Binding or
// a Snapshot that came from there was verified.
package mesh
