package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
)

// newSerial draws 128 random bits; RFC 5280 allows 20 bytes and forbids zero.
func newSerial() *big.Int {
	var b [16]byte
	for {
		// crypto/rand.Read never fails: it ends the process instead.
		_, _ = rand.Read(b[:])
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n
		}
	}
}

// serialText is the serial in hex, always 32 digits.
func serialText(c *x509.Certificate) string {
	return hex.EncodeToString(c.SerialNumber.FillBytes(make([]byte, max(16, (c.SerialNumber.BitLen()+7)/8))))
}

func newRoot(td identity.TrustDomain, now time.Time) (signer, error) {
	return selfOrSigned(signer{}, &x509.Certificate{
		Subject:  pkix.Name{Organization: []string{"Signet"}, CommonName: "Signet root of " + shortName(td)},
		URIs:     []*url.URL{{Scheme: "spiffe", Host: td.String()}},
		NotAfter: now.Add(RootLife), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, now)
}

func newIssuing(td identity.TrustDomain, root signer, now time.Time) (signer, error) {
	return selfOrSigned(root, &x509.Certificate{
		Subject:  pkix.Name{Organization: []string{"Signet"}, CommonName: "Signet issuing key of " + shortName(td)},
		URIs:     []*url.URL{{Scheme: "spiffe", Host: td.String()}},
		NotAfter: now.Add(IssuingLife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, now)
}

// selfOrSigned makes a P-256 signing key; without a parent it signs itself.
func selfOrSigned(parent signer, tmpl *x509.Certificate, now time.Time) (signer, error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return signer{}, fmt.Errorf("make key: %w", err)
	}
	if parent.cert == nil {
		parent = signer{priv, tmpl}
	}
	cert, err := sign(parent, tmpl, priv.Public(), now)
	return signer{priv, cert}, err
}

// newDistribution makes the Ed25519 key that signs snapshots. Its usage is one that no SVID has, and it lacks theirs.
func newDistribution(td identity.TrustDomain, root signer, now time.Time) (signer, error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return signer{}, fmt.Errorf("make key: %w", err)
	}
	cert, err := sign(root, &x509.Certificate{
		URIs:     []*url.URL{td.Distribution().URL()},
		NotAfter: now.Add(DistributionLife), BasicConstraintsValid: true,
		KeyUsage:           x509.KeyUsageDigitalSignature,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{identity.DistributionEKU()},
	}, pub, now)
	return signer{priv, cert}, err
}

// svidTemplate is the whole content of an SVID. Nothing in it comes from a request.
func svidTemplate(id identity.ID, notAfter time.Time) *x509.Certificate {
	return &x509.Certificate{
		URIs:     []*url.URL{id.URL()},
		NotAfter: notAfter, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// sign completes a template and signs it. A certificate never outlives its issuer.
func sign(parent signer, tmpl *x509.Certificate, pub crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	tmpl.SerialNumber = newSerial()
	tmpl.NotBefore = now.Add(-Backdate)
	if parent.cert != tmpl {
		if parent.cert.NotAfter.Before(tmpl.NotAfter) {
			tmpl.NotAfter = parent.cert.NotAfter
		}
		if parent.cert.NotBefore.After(tmpl.NotBefore) {
			tmpl.NotBefore = parent.cert.NotBefore
		}
		if !tmpl.NotAfter.After(now) {
			return nil, fmt.Errorf("the signing certificate %s ended at %s", parent.cert.Subject, parent.cert.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent.cert, pub, parent.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read certificate back: %w", err)
	}
	return cert, nil
}

// shortName fits a trust domain into a common name, which X.520 limits to 64 characters.
func shortName(td identity.TrustDomain) string {
	const most = 40
	if name := td.String(); len(name) <= most {
		return name
	}
	return td.String()[:most]
}
