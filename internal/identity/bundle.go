package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
)

// MaxRoots bounds a bundle: more roots than any rotation needs are refused.
const MaxRoots = 16

// ErrBundle is wrapped by every refusal of a trust bundle.
var ErrBundle = errors.New("invalid trust bundle")

// Bundle is the set of roots that one trust domain is verified against. It is immutable: readers share it. The zero
// value trusts nothing.
type Bundle struct {
	td       TrustDomain
	roots    []*x509.Certificate
	sequence uint64
}

// NewBundle checks that each root may sign certificates and claims no other trust domain. The first root is the one
// that Pin names.
func NewBundle(td TrustDomain, roots []*x509.Certificate, sequence uint64) (Bundle, error) {
	if td.IsZero() {
		return Bundle{}, fmt.Errorf("%w: no trust domain", ErrBundle)
	}
	if len(roots) > MaxRoots {
		return Bundle{}, fmt.Errorf("%w: %d roots, at most %d", ErrBundle, len(roots), MaxRoots)
	}
	for i, r := range roots {
		if r == nil {
			return Bundle{}, fmt.Errorf("%w: root %d is missing", ErrBundle, i+1)
		}
		if err := checkLimits(r); err != nil {
			return Bundle{}, fmt.Errorf("%w: root %d: %w", ErrBundle, i+1, err)
		}
		if err := checkSigner(r, td); err != nil {
			return Bundle{}, fmt.Errorf("%w: root %d: %w", ErrBundle, i+1, err)
		}
		if slices.ContainsFunc(roots[:i], r.Equal) {
			return Bundle{}, fmt.Errorf("%w: root %d stands there twice", ErrBundle, i+1)
		}
	}
	return Bundle{td: td, roots: slices.Clone(roots), sequence: sequence}, nil
}

// ParseBundlePEM reads certificates in PEM; anything else between them is refused.
func ParseBundlePEM(td TrustDomain, text []byte, sequence uint64) (Bundle, error) {
	var ders [][]byte
	for rest := bytes.TrimSpace(text); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
			return Bundle{}, fmt.Errorf("%w: text that is not PEM", ErrBundle)
		}
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return Bundle{}, fmt.Errorf("%w: PEM that does not end or decode", ErrBundle)
		}
		if block.Type != "CERTIFICATE" {
			return Bundle{}, fmt.Errorf("%w: a PEM block of type %.40q, expected CERTIFICATE", ErrBundle, block.Type)
		}
		if len(ders) == MaxRoots {
			return Bundle{}, fmt.Errorf("%w: more than %d roots", ErrBundle, MaxRoots)
		}
		ders = append(ders, block.Bytes)
	}
	return ParseBundleDER(td, ders, sequence)
}

// ParseBundleDER reads one certificate from each element. A bundle without a root is refused: nothing could be
// verified with it, and an empty file is more often a mistake than a wish to trust nobody.
func ParseBundleDER(td TrustDomain, ders [][]byte, sequence uint64) (Bundle, error) {
	if len(ders) == 0 {
		return Bundle{}, fmt.Errorf("%w: no certificate", ErrBundle)
	}
	roots, err := ParseChain(ders)
	if err != nil {
		return Bundle{}, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	return NewBundle(td, roots, sequence)
}

// ParseChain parses certificates after checking their size and number.
func ParseChain(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) > MaxRoots {
		return nil, &VerifyError{Code: CodeLimit, Detail: fmt.Sprintf("%d certificates, at most %d", len(ders), MaxRoots)}
	}
	certs := make([]*x509.Certificate, 0, len(ders))
	for i, der := range ders {
		if len(der) > MaxCertificateSize {
			return nil, &VerifyError{Code: CodeLimit, Detail: fmt.Sprintf("certificate %d has %d bytes, at most %d", i+1, len(der), MaxCertificateSize)}
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d: %w", i+1, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// TrustDomain returns the domain whose IDs the roots vouch for.
func (b Bundle) TrustDomain() TrustDomain { return b.td }

// Roots returns a copy of the list; the certificates themselves are shared and must not be changed.
func (b Bundle) Roots() []*x509.Certificate { return slices.Clone(b.roots) }

// Sequence grows with every change of the roots.
func (b Bundle) Sequence() uint64 { return b.sequence }

// IsZero reports whether the bundle was never set.
func (b Bundle) IsZero() bool { return b.td.IsZero() }

// Pin is the SHA-256 of the first root's public key, as join tokens carry it; zero without a root.
func (b Bundle) Pin() [32]byte {
	if len(b.roots) == 0 {
		return [32]byte{}
	}
	return SPKIHash(b.roots[0])
}

// DER returns the roots' certificates.
func (b Bundle) DER() [][]byte {
	out := make([][]byte, 0, len(b.roots))
	for _, r := range b.roots {
		out = append(out, slices.Clone(r.Raw))
	}
	return out
}

// PEM returns the roots' certificates, one block after another.
func (b Bundle) PEM() []byte {
	var out bytes.Buffer
	for _, r := range b.roots {
		// Writing to a bytes.Buffer cannot fail.
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})
	}
	return out.Bytes()
}

// contains reports whether c is, byte for byte, one of the roots.
func (b Bundle) contains(c *x509.Certificate) bool { return slices.ContainsFunc(b.roots, c.Equal) }

// SPKIHash is the SHA-256 of the certificate's SubjectPublicKeyInfo: the name of a key, whatever certificate it is in.
func SPKIHash(c *x509.Certificate) [32]byte { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }
