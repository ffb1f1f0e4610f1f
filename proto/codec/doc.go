// Package codec turns values of the vocabulary into the bytes of proto/signetv1 and back. It is the border where
// parsing and signature checks happen: a value that came out of here is valid and, where it is signed, verified.
//
// Encoding is deterministic, so that equal values give equal bytes and equal hashes. The coordinator uses encode.go,
// agents use decode.go (one value each) and held.go (a whole snapshot, its deltas, and its form on disk).
package codec
