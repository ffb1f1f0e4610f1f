// Package key holds the static keys of WireGuard and the key that seals state at rest.
//
// It owns their types and nothing else: session keys belong to WireGuard, signing keys to the authority. A Private
// key and a StateKey never print: every formatting verb yields a redaction, and neither can be compared with ==.
//
// Start at wireguard.go; sealing is in seal.go.
package key
