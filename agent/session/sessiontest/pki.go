// Package sessiontest is a coordinator for tests: real TLS and gRPC, certificates made on the spot, and a snapshot that
// the test writes. It is as strict as the real one where agents could notice, and does as it is told elsewhere.
package sessiontest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
)

// Domain is the trust domain of every test.
const Domain = "settler.example"

// PKI is a root, an issuing key and a distribution key.
type PKI struct {
	TD      identity.TrustDomain
	Root    *x509.Certificate
	Issuing *x509.Certificate
	Bundle  identity.Bundle
	// Distribution certifies the key that signs snapshots.
	Distribution []byte
	signKey      ed25519.PrivateKey
	rootKey      *ecdsa.PrivateKey
	issuingKey   *ecdsa.PrivateKey
}

// NewPKI makes a trust domain.
func NewPKI(t testing.TB) *PKI {
	t.Helper()
	td, err := identity.ParseTrustDomain(Domain)
	check(t, err)
	p := &PKI{TD: td, rootKey: newKey(t), issuingKey: newKey(t)}
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{{Scheme: "spiffe", Host: Domain}},
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotAfter: time.Now().Add(240 * time.Hour)}
	}
	root := ca("root")
	p.Root = p.sign(t, root, root, p.rootKey.Public(), p.rootKey)
	p.Issuing = p.sign(t, ca("issuing"), p.Root, p.issuingKey.Public(), p.rootKey)
	p.Bundle, err = identity.NewBundle(td, []*x509.Certificate{p.Root}, 1)
	check(t, err)
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	p.signKey = priv
	p.Distribution = p.sign(t, &x509.Certificate{URIs: []*url.URL{td.Distribution().URL()}, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, UnknownExtKeyUsage: []asn1.ObjectIdentifier{identity.DistributionEKU()}, NotAfter: time.Now().Add(240 * time.Hour)},
		p.Root, pub, p.rootKey).Raw
	return p
}

// Token makes a join token that pins the root.
func (p *PKI) Token(t testing.TB) identity.JoinToken {
	t.Helper()
	var secret [32]byte
	_, err := rand.Read(secret[:])
	check(t, err)
	token, err := identity.NewJoinToken(identity.JoinTokenID(secret), secret, p.Bundle.Pin(), p.TD)
	check(t, err)
	return token
}

// Sign signs with the distribution key.
func (p *PKI) Sign(m []byte) []byte { return ed25519.Sign(p.signKey, m) }

// Issue makes an SVID that lives from life before now to life after.
func (p *PKI) Issue(t testing.TB, id identity.ID, pub crypto.PublicKey, from, until time.Time) [][]byte {
	t.Helper()
	leaf := p.sign(t, &x509.Certificate{URIs: []*url.URL{id.URL()}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, NotBefore: from, NotAfter: until},
		p.Issuing, pub, p.issuingKey)
	return [][]byte{leaf.Raw, p.Issuing.Raw}
}

// Serving is the coordinator's own certificate, its root included.
func (p *PKI) Serving(t testing.TB) *tls.Certificate {
	t.Helper()
	k := newKey(t)
	chain := p.Issue(t, p.TD.Coordinator(), k.Public(), time.Now().Add(-time.Minute), time.Now().Add(24*time.Hour))
	return &tls.Certificate{Certificate: append(chain, p.Root.Raw), PrivateKey: k}
}

func (p *PKI) sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, k crypto.Signer) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	check(t, err)
	tmpl.SerialNumber = serial
	if tmpl.NotBefore.IsZero() {
		tmpl.NotBefore = time.Now().Add(-240 * time.Hour)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, k)
	check(t, err)
	c, err := x509.ParseCertificate(der)
	check(t, err)
	return c
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return k
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(fmt.Errorf("sessiontest: %w", err))
	}
}
