package authority

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
)

// maxRequestSize bounds a certificate request before it is parsed; an honest one has about 200 bytes.
const maxRequestSize = 4 << 10

// Request is a certificate request whose asker has proven to hold the private key.
type Request struct {
	// SPKI is the SHA-256 of the public key.
	SPKI [32]byte
	pub  *ecdsa.PublicKey
}

// ParseRequest reads a PKCS #10 request in DER. Its subject, names and extensions are read by nobody.
func ParseRequest(der []byte) (Request, error) {
	if len(der) > maxRequestSize {
		return Request{}, fmt.Errorf("%w: %d bytes, at most %d", ErrRequest, len(der), maxRequestSize)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return Request{}, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	pub, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return Request{}, fmt.Errorf("%w: its key is %v, expected ECDSA on P-256", ErrRequest, csr.PublicKeyAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return Request{}, fmt.Errorf("%w: it is not signed by its own key", ErrRequest)
	}
	return Request{SPKI: sha256.Sum256(csr.RawSubjectPublicKeyInfo), pub: pub}, nil
}

// Issued is a certificate that was made and logged.
type Issued struct {
	Chain    [][]byte // DER, leaf first, without the root
	Serial   string
	NotAfter time.Time
}

// IssueNode makes a node's SVID in a transaction of its own. It does not ask whether the node may have one.
func (a *Authority) IssueNode(ctx context.Context, csr []byte, id identity.ID) (chain [][]byte, notAfter time.Time, err error) {
	req, err := ParseRequest(csr)
	if err != nil {
		return nil, time.Time{}, err
	}
	var out Issued
	_, err = a.store.Update(ctx, func(tx store.Tx) (err error) {
		out, err = a.IssueNodeIn(tx, req, id)
		return err
	})
	return out.Chain, out.NotAfter, err
}

// IssueNodeIn makes a node's SVID as part of the transaction that entitles the node: the log has the line exactly when
// the enrolment or renewal is committed. When it is not, the certificate must not be handed out.
func (a *Authority) IssueNodeIn(tx store.Tx, req Request, id identity.ID) (Issued, error) {
	if id.NodeName() == "" || id.TrustDomain() != a.opts.TrustDomain {
		return Issued{}, fmt.Errorf("issue: %q is no node of %s", id, a.opts.TrustDomain)
	}
	if req.pub == nil {
		return Issued{}, fmt.Errorf("issue: %w: empty", ErrRequest)
	}
	now := a.opts.Now()
	issuer := a.issuer()
	cert, err := sign(issuer, svidTemplate(id, now.Add(a.opts.NodeLife)), req.pub, now)
	if err != nil {
		return Issued{}, fmt.Errorf("issue %s: %w", id, err)
	}
	if err := record(tx, cert, now); err != nil {
		return Issued{}, fmt.Errorf("issue %s: %w", id, err)
	}
	return Issued{Chain: [][]byte{cert.Raw, issuer.cert.Raw}, Serial: serialText(cert), NotAfter: cert.NotAfter}, nil
}

func (a *Authority) issuer() signer {
	a.keys.RLock()
	defer a.keys.RUnlock()
	return a.keys.issuing
}

// record writes a certificate into the issuance log.
func record(tx store.Tx, cert *x509.Certificate, now time.Time) error {
	var id string
	if len(cert.URIs) > 0 {
		id = cert.URIs[0].String()
	}
	_, err := tx.AppendIssuance(store.Issuance{Serial: serialText(cert), ID: id, SPKI: identity.SPKIHash(cert), NotAfter: cert.NotAfter, Time: now})
	return err
}

// Bounds of renewing the serving certificate inside a handshake.
const (
	renewTimeout = 5 * time.Second
	renewRetry   = 30 * time.Second
)

// ServerCertificate is the coordinator's own SVID, for identity.ServerTLS. Its key is only in memory. It is renewed from
// half of its life on; while that fails the old one is used to its end, and after that there is none.
func (a *Authority) ServerCertificate() *tls.Certificate {
	a.serving.Lock()
	defer a.serving.Unlock()
	now, leaf := a.opts.Now(), a.serving.cert.Leaf
	half := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)
	if now.Before(half) {
		return a.serving.cert
	}
	if !now.Before(a.serving.nextTry) {
		// Handshakes wait here for one disk write, once per half-life.
		ctx, cancel := context.WithTimeout(context.Background(), renewTimeout)
		defer cancel()
		if fresh, err := a.newServing(ctx); err == nil {
			a.serving.cert = fresh
			return fresh
		}
		a.serving.nextTry = now.Add(renewRetry)
	}
	if now.Before(leaf.NotAfter) {
		return a.serving.cert
	}
	return nil
}

func (a *Authority) newServing(ctx context.Context) (*tls.Certificate, error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make serving key: %w", err)
	}
	now := a.opts.Now()
	issuer := a.issuer()
	leaf, err := sign(issuer, svidTemplate(a.opts.TrustDomain.Coordinator(), now.Add(ServingLife)), priv.Public(), now)
	if err != nil {
		return nil, fmt.Errorf("make serving certificate: %w", err)
	}
	if _, err := a.store.Update(ctx, func(tx store.Tx) error { return record(tx, leaf, now) }); err != nil {
		return nil, fmt.Errorf("make serving certificate: %w", err)
	}
	// The root goes along for hosts that know no more of it than the pin in their join token.
	chain := [][]byte{leaf.Raw, issuer.cert.Raw, a.rootDER()}
	return &tls.Certificate{Certificate: chain, PrivateKey: priv, Leaf: leaf}, nil
}

func (a *Authority) rootDER() []byte {
	a.keys.RLock()
	defer a.keys.RUnlock()
	return a.keys.root.cert.Raw
}
