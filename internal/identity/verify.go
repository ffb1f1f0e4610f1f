package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// Limits that are checked before any signature, so that a stranger's chain costs next to nothing.
const (
	MaxChainLength     = 5        // certificates that a peer presents, its root included
	MaxCertificateSize = 16 << 10 // bytes of DER
	MinRSABits         = 2048
	MaxRSABits         = 8192
	// RenewGrace is how long after its end a node's SVID may still ask for its own renewal.
	RenewGrace = 30 * 24 * time.Hour
)

// Code names what is wrong with a chain. The codes are stable; the list is closed (reference/identity.md, 9.3).
type Code string

// The codes. The last five are Signet's own additions to that list.
const (
	CodeExpired         Code = "CERT_EXPIRED"
	CodeNotYetValid     Code = "CERT_NOT_YET_VALID"
	CodeUnknownCA       Code = "UNKNOWN_CA"
	CodeChainIncomplete Code = "CHAIN_INCOMPLETE"
	CodeTrustDomain     Code = "TD_MISMATCH"
	CodeURICount        Code = "URI_SAN_COUNT"
	CodeIDMismatch      Code = "ID_MISMATCH"
	CodeRootPath        Code = "ROOT_PATH"
	CodeKeyUsage        Code = "BAD_KU"
	CodeExtKeyUsage     Code = "BAD_EKU"
	CodeNoCertificate   Code = "PEER_NO_CERT"
	CodeTLSVersion      Code = "TLS_VERSION"
	CodeAlgorithm       Code = "TLS_ALG"

	CodeBadID        Code = "BAD_ID"          // the URI is not a SPIFFE ID
	CodeSubjectAlt   Code = "SAN_CRITICAL"    // the subject is empty and the SAN extension is not critical
	CodeLimit        Code = "CERT_LIMIT"      // too long, too many, or valid for too long
	CodeConstraint   Code = "CERT_CONSTRAINT" // a name or path-length constraint of an issuer is broken
	CodeCriticalExtn Code = "CERT_EXTENSION"  // a critical extension that the verifier does not know
)

// VerifyError is a refusal with its reason. It holds nothing secret.
type VerifyError struct {
	Code   Code
	Detail string // one plain phrase
	ID     ID     // what the certificate claims, when that much could be read; not proven
	// Skew is how far the clocks would have to differ for the certificate to be valid now; zero for other codes.
	Skew time.Duration
}

// Error is the code and the detail.
func (e *VerifyError) Error() string {
	if e.ID.IsZero() {
		return fmt.Sprintf("%s: %s", e.Code, e.Detail)
	}
	return fmt.Sprintf("%s: %s: %s", e.Code, e.ID, e.Detail)
}

// CodeOf returns the code inside err, or "" when it is no VerifyError.
func CodeOf(err error) Code {
	var ve *VerifyError
	if errors.As(err, &ve) {
		return ve.Code
	}
	return ""
}

// Usage is what the peer does with its certificate. An SVID must be good for both; Usage matters for intermediates
// that restrict it.
type Usage uint8

// The usages.
const (
	UsageBoth Usage = iota
	UsageClient
	UsageServer
)

// Options adjust the verification. The zero value, with Now set, is the strictest.
type Options struct {
	Now time.Time
	// ExpiredGrace lets a leaf through that ended no longer ago, with Verified.Expired set. Only Renew may ask for it.
	// Its issuers must be valid at Now all the same.
	ExpiredGrace time.Duration
	// Skew is how far in the future NotBefore may lie.
	Skew time.Duration
	// MaxLifetime refuses leaves that are valid for longer; 0 is no limit.
	MaxLifetime time.Duration
	Usage       Usage
}

// Verified is a peer whose ID is proven.
type Verified struct {
	ID      ID
	Leaf    *x509.Certificate
	Expired bool // only with Options.ExpiredGrace
}

// VerifyX509 verifies an X509-SVID against the bundle of its own trust domain. chain is as presented, leaf first. Every
// refusal is a *VerifyError. In order, cheap before dear:
//
//  1. limits: number, size and key of each certificate;
//  2. the leaf says who it is: exactly one URI SAN, a SPIFFE ID with a path, of the bundle's trust domain;
//  3. the leaf is a leaf: signs nothing, digitalSignature, both TLS usages, and no usage of our own for other things;
//  4. time, of the leaf (with grace) and of its issuers (without);
//  5. each certificate is signed by the next, the last one by a root of the bundle;
//  6. RFC 5280 path validation by crypto/x509, for constraints and critical extensions.
func VerifyX509(b Bundle, chain []*x509.Certificate, opts Options) (Verified, error) {
	if len(chain) == 0 || chain[0] == nil {
		return Verified{}, &VerifyError{Code: CodeNoCertificate, Detail: "the peer presented no certificate"}
	}
	if err := checkChainLimits(chain); err != nil {
		return Verified{}, err
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return Verified{}, err
	}
	if id.TrustDomain() != b.td {
		return Verified{}, &VerifyError{Code: CodeTrustDomain, ID: id, Detail: fmt.Sprintf("its trust domain is %s, ours is %q", id.TrustDomain(), b.td)}
	}
	if err := checkLeaf(leaf, id); err != nil {
		return Verified{}, err
	}
	expired, err := checkTime(leaf, id, opts)
	if err != nil {
		return Verified{}, err
	}
	if err := checkPath5280(b, chain, id, opts, expired); err != nil {
		return Verified{}, err
	}
	return Verified{ID: id, Leaf: leaf, Expired: expired}, nil
}

// checkTime judges the leaf's own dates.
func checkTime(leaf *x509.Certificate, id ID, opts Options) (expired bool, err error) {
	if life := leaf.NotAfter.Sub(leaf.NotBefore); opts.MaxLifetime > 0 && life > opts.MaxLifetime {
		return false, &VerifyError{Code: CodeLimit, ID: id, Detail: fmt.Sprintf("it is valid for %v, at most %v is accepted", life, opts.MaxLifetime)}
	}
	if leaf.NotAfter.Before(leaf.NotBefore) {
		return false, &VerifyError{Code: CodeExpired, ID: id, Detail: "it ends before it begins"}
	}
	if early := leaf.NotBefore.Sub(opts.Now); early > opts.Skew {
		return false, &VerifyError{Code: CodeNotYetValid, ID: id, Skew: early, Detail: fmt.Sprintf("it becomes valid in %v, at %s; is a clock wrong?", early.Round(time.Second), stamp(leaf.NotBefore))}
	}
	late := opts.Now.Sub(leaf.NotAfter)
	if late <= 0 {
		return false, nil
	}
	if late > opts.ExpiredGrace {
		return false, &VerifyError{Code: CodeExpired, ID: id, Skew: late, Detail: fmt.Sprintf("it ended %v ago, at %s", late.Round(time.Second), stamp(leaf.NotAfter))}
	}
	return true, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
