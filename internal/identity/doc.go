// Package identity is the vocabulary of who: trust domains, SPIFFE IDs, Zones, Numbers, trust bundles, and the strict
// verification of certificates against them.
//
// Parsing is the only way in: a TrustDomain or an ID that exists is valid, comparable and usable as a map key. The
// rules are those of the SPIFFE-ID and X509-SVID standards, read strictly (upper case is refused, not folded).
//
// Start at id.go; certificates are in verify.go.
package identity
