// Package authority owns the keys that others trust: the root, the issuing key below it, and the key that signs
// snapshots and Bindings. It issues node SVIDs and the coordinator's own serving certificate.
//
// A certificate is made from a template; of a request nothing counts but its public key and the proof that the asker
// holds the private one. Every certificate is a line of the hash-chained issuance log, in the transaction that caused
// it. Private keys are sealed at rest and leave this package never. Who may have a certificate is decided elsewhere
// (coordinator/registry).
//
// Start at authority.go; the templates are in template.go, issuing in issue.go.
package authority
