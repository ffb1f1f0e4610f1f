package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
)

// OIDs of the extensions that are read from the raw certificate, because crypto/x509 does not keep what matters: the
// exact bytes of a URI, and whether an extension is critical.
var (
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
)

// oidDistribution stands below 2.25, which needs no registration (ITU-T X.667). The arc is short because crypto/x509
// reads arcs of at most 31 bits.
var oidDistribution = asn1.ObjectIdentifier{2, 25, 1936287598, 1}

// DistributionEKU is the extended key usage of the key that signs snapshots and Bindings, and of nothing else.
func DistributionEKU() asn1.ObjectIdentifier { return slices.Clone(oidDistribution) }

const tagURI = 6 // GeneralName uniformResourceIdentifier, RFC 5280 4.2.1.6

func checkChainLimits(chain []*x509.Certificate) error {
	if len(chain) > MaxChainLength {
		return &VerifyError{Code: CodeLimit, Detail: fmt.Sprintf("the chain has %d certificates, at most %d", len(chain), MaxChainLength)}
	}
	for _, c := range chain {
		if err := checkLimits(c); err != nil {
			return err
		}
	}
	return nil
}

// checkLimits bounds what one certificate can cost.
func checkLimits(c *x509.Certificate) error {
	if len(c.Raw) > MaxCertificateSize {
		return &VerifyError{Code: CodeLimit, Detail: fmt.Sprintf("a certificate has %d bytes, at most %d", len(c.Raw), MaxCertificateSize)}
	}
	switch pub := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := pub.N.BitLen(); bits < MinRSABits || bits > MaxRSABits {
			return &VerifyError{Code: CodeAlgorithm, Detail: fmt.Sprintf("an RSA key of %d bits, expected %d to %d", bits, MinRSABits, MaxRSABits)}
		}
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P224() {
			return &VerifyError{Code: CodeAlgorithm, Detail: "a key on P-224, expected P-256 or stronger"}
		}
	case ed25519.PublicKey:
	default:
		return &VerifyError{Code: CodeAlgorithm, Detail: fmt.Sprintf("a key of the unsupported kind %v", c.PublicKeyAlgorithm)}
	}
	return nil
}

// leafID reads the one SPIFFE ID of a leaf.
func leafID(c *x509.Certificate) (ID, error) {
	uris, err := uriNames(c)
	if err != nil {
		return ID{}, err
	}
	if len(uris) != 1 {
		return ID{}, &VerifyError{Code: CodeURICount, Detail: fmt.Sprintf("%d URI names, expected exactly one SPIFFE ID", len(uris))}
	}
	uri := uris[0]
	if td, ok := strings.CutPrefix(uri, scheme); ok {
		if _, err := ParseTrustDomain(strings.TrimSuffix(td, "/")); err == nil {
			return ID{}, &VerifyError{Code: CodeRootPath, Detail: fmt.Sprintf("%s names a trust domain, not a workload", uri)}
		}
	}
	id, err := ParseID(uri)
	if err != nil {
		return ID{}, &VerifyError{Code: CodeBadID, Detail: err.Error()}
	}
	return id, nil
}

// uriNames returns the URI names byte for byte. url.URL cannot be used: it drops an empty fragment and folds the
// scheme's case, so that what is compared would not be what was signed.
func uriNames(c *x509.Certificate) ([]string, error) {
	var out []string
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var seq asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &seq)
		if err != nil || len(rest) != 0 || seq.Tag != asn1.TagSequence || !seq.IsCompound {
			return nil, &VerifyError{Code: CodeBadID, Detail: "the subject alternative names do not parse"}
		}
		for body := seq.Bytes; len(body) > 0; {
			var name asn1.RawValue
			if body, err = asn1.Unmarshal(body, &name); err != nil {
				return nil, &VerifyError{Code: CodeBadID, Detail: "the subject alternative names do not parse"}
			}
			if name.Class == asn1.ClassContextSpecific && name.Tag == tagURI {
				out = append(out, string(name.Bytes))
			}
		}
	}
	return out, nil
}

// checkLeaf refuses certificates that could sign others or were made for another purpose.
func checkLeaf(c *x509.Certificate, id ID) error {
	bad := func(code Code, detail string) error { return &VerifyError{Code: code, ID: id, Detail: detail} }
	if c.BasicConstraintsValid && c.IsCA {
		return bad(CodeKeyUsage, "it is a signing certificate (cA=true)")
	}
	if present, critical := extension(c, oidKeyUsage); !present || !critical {
		return bad(CodeKeyUsage, "key usage is absent or not critical")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return bad(CodeKeyUsage, "it may sign certificates or revocation lists")
	}
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return bad(CodeKeyUsage, "digitalSignature is missing")
	}
	if slices.ContainsFunc(c.UnknownExtKeyUsage, isDistributionEKU) {
		return bad(CodeExtKeyUsage, "it signs snapshots and is never a TLS peer")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 &&
		!(slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)) {
		return bad(CodeExtKeyUsage, "extended key usage must list both serverAuth and clientAuth")
	}
	if _, critical := extension(c, oidSubjectAltName); !critical && emptySubject(c) {
		return bad(CodeSubjectAlt, "the subject is empty and the SPIFFE ID's extension is not critical")
	}
	return nil
}

// checkSigner refuses issuers and roots that may not sign, or that carry an ID of their own.
func checkSigner(c *x509.Certificate, td TrustDomain) error {
	if !c.BasicConstraintsValid || !c.IsCA {
		return &VerifyError{Code: CodeKeyUsage, Detail: fmt.Sprintf("issuer %s is no signing certificate (cA=false)", nameOf(c))}
	}
	if _, critical := extension(c, oidBasicConstraints); !critical {
		return &VerifyError{Code: CodeKeyUsage, Detail: fmt.Sprintf("basic constraints of issuer %s are not critical", nameOf(c))}
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return &VerifyError{Code: CodeKeyUsage, Detail: fmt.Sprintf("issuer %s lacks keyCertSign", nameOf(c))}
	}
	uris, err := uriNames(c)
	if err != nil {
		return err
	}
	for _, uri := range uris {
		rest, ok := strings.CutPrefix(uri, scheme)
		if !ok {
			continue
		}
		claimed, err := ParseTrustDomain(rest)
		if err != nil {
			return &VerifyError{Code: CodeBadID, Detail: fmt.Sprintf("issuer %s has an ID with a path", nameOf(c))}
		}
		if claimed != td {
			return &VerifyError{Code: CodeTrustDomain, Detail: fmt.Sprintf("issuer %s belongs to trust domain %s, not %s", nameOf(c), claimed, td)}
		}
	}
	return nil
}

func isDistributionEKU(oid asn1.ObjectIdentifier) bool { return oidDistribution.Equal(oid) }

func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) (present, critical bool) {
	for _, ext := range c.Extensions {
		if ext.Id.Equal(oid) {
			return true, ext.Critical
		}
	}
	return false, false
}

// emptySubject: an empty RDNSequence is 30 00.
func emptySubject(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, []byte{0x30, 0}) }

// nameOf is a certificate's subject for messages, bounded and quoted because a stranger wrote it.
func nameOf(c *x509.Certificate) string { return fmt.Sprintf("%.80q", c.Subject.String()) }
