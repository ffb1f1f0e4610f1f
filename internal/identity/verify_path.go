package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// checkPath5280 follows the chain link by link, for a precise code, and then lets crypto/x509 judge the same path, for
// everything that RFC 5280 asks besides.
func checkPath5280(b Bundle, chain []*x509.Certificate, id ID, opts Options, expired bool) error {
	withID := func(err error) error {
		var ve *VerifyError
		if errors.As(err, &ve) {
			ve.ID = id
		}
		return err
	}
	for i, c := range chain[1:] {
		if err := checkSigner(c, b.td); err != nil {
			return withID(err)
		}
		if err := checkIssuerTime(c, opts.Now); err != nil {
			return withID(err)
		}
		if err := checkLink(chain[i], c); err != nil {
			return withID(err)
		}
	}
	root, err := findRoot(b, chain)
	if err != nil {
		return withID(err)
	}
	if err := checkIssuerTime(root, opts.Now); err != nil {
		return withID(err)
	}
	at := opts.Now
	if leaf := chain[0]; expired {
		at = leaf.NotAfter
	} else if at.Before(leaf.NotBefore) {
		at = leaf.NotBefore // within Options.Skew
	}
	return withID(verifyStandard(root, chain, at, opts.Usage))
}

func checkIssuerTime(c *x509.Certificate, now time.Time) error {
	if late := now.Sub(c.NotAfter); late > 0 {
		return &VerifyError{Code: CodeExpired, Skew: late, Detail: fmt.Sprintf("issuer %s ended %v ago, at %s", nameOf(c), late.Round(time.Second), stamp(c.NotAfter))}
	}
	if early := c.NotBefore.Sub(now); early > 0 {
		return &VerifyError{Code: CodeNotYetValid, Skew: early, Detail: fmt.Sprintf("issuer %s becomes valid in %v; is a clock wrong?", nameOf(c), early.Round(time.Second))}
	}
	return nil
}

// checkLink checks that parent issued child.
func checkLink(child, parent *x509.Certificate) error {
	if !bytes.Equal(child.RawIssuer, parent.RawSubject) {
		return &VerifyError{Code: CodeChainIncomplete, Detail: fmt.Sprintf("%s was issued by %.80q, but the next certificate is %s", nameOf(child), child.Issuer.String(), nameOf(parent))}
	}
	return checkSignature(child, parent)
}

func checkSignature(child, parent *x509.Certificate) error {
	err := child.CheckSignatureFrom(parent)
	if err == nil {
		return nil
	}
	var weak x509.InsecureAlgorithmError
	if errors.As(err, &weak) || errors.Is(err, x509.ErrUnsupportedAlgorithm) {
		return &VerifyError{Code: CodeAlgorithm, Detail: fmt.Sprintf("%s is signed with %v", nameOf(child), child.SignatureAlgorithm)}
	}
	return &VerifyError{Code: CodeUnknownCA, Detail: fmt.Sprintf("the signature of %s is not by the key of %s", nameOf(child), nameOf(parent))}
}

// findRoot returns the root of the bundle that the presented chain ends in or hangs from.
func findRoot(b Bundle, chain []*x509.Certificate) (*x509.Certificate, error) {
	top := chain[len(chain)-1]
	if len(chain) > 1 && b.contains(top) {
		return top, nil
	}
	var named bool
	for _, r := range b.roots {
		if !bytes.Equal(r.RawSubject, top.RawIssuer) {
			continue
		}
		named = true
		err := checkSignature(top, r)
		if err == nil {
			return r, nil
		}
		if CodeOf(err) == CodeAlgorithm {
			return nil, err
		}
	}
	switch {
	case named:
		return nil, &VerifyError{Code: CodeUnknownCA, Detail: fmt.Sprintf("it claims our root %.80q, whose key did not sign it", top.Issuer.String())}
	case len(chain) == 1 && !bytes.Equal(top.RawIssuer, top.RawSubject):
		return nil, &VerifyError{Code: CodeChainIncomplete, Detail: fmt.Sprintf("its issuer %.80q is neither among the %d trusted roots (bundle %d) nor presented", top.Issuer.String(), len(b.roots), b.sequence)}
	}
	return nil, &VerifyError{Code: CodeUnknownCA, Detail: fmt.Sprintf("issuer %.80q is not among the %d trusted roots (bundle %d)", top.Issuer.String(), len(b.roots), b.sequence)}
}

// verifyStandard asks crypto/x509 for a path through exactly these certificates to exactly this root.
func verifyStandard(root *x509.Certificate, chain []*x509.Certificate, at time.Time, usage Usage) error {
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	vo := x509.VerifyOptions{Roots: roots, Intermediates: inter, CurrentTime: at}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	switch usage {
	case UsageClient:
		usages = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	case UsageServer:
		usages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	// VerifyOptions.KeyUsages means "any of these", and an SVID must be good for all of them.
	for _, u := range usages {
		vo.KeyUsages = []x509.ExtKeyUsage{u}
		if _, err := chain[0].Verify(vo); err != nil {
			return standardError(err)
		}
	}
	return nil
}

func standardError(err error) error {
	ve := &VerifyError{Code: CodeUnknownCA, Detail: err.Error()}
	var invalid x509.CertificateInvalidError
	var critical x509.UnhandledCriticalExtension
	switch {
	case errors.As(err, &critical):
		ve.Code = CodeCriticalExtn
	case errors.As(err, &invalid):
		switch invalid.Reason {
		case x509.Expired:
			ve.Code = CodeExpired
		case x509.IncompatibleUsage:
			ve.Code = CodeExtKeyUsage
		case x509.NotAuthorizedToSign:
			ve.Code = CodeKeyUsage
		default:
			ve.Code = CodeConstraint
		}
	}
	return ve
}

// VerifyPinned verifies a coordinator on first contact, when all that is known is the pin from a join token: the chain
// must end in a root whose key has that hash, and the leaf must be the coordinator of the root's trust domain. The
// bundle that comes back holds that root alone.
func VerifyPinned(pin [32]byte, chain []*x509.Certificate, now time.Time) (Bundle, ID, error) {
	if len(chain) == 0 {
		return Bundle{}, ID{}, &VerifyError{Code: CodeNoCertificate, Detail: "the coordinator presented no certificate"}
	}
	if err := checkChainLimits(chain); err != nil {
		return Bundle{}, ID{}, err
	}
	id, err := leafID(chain[0])
	if err != nil {
		return Bundle{}, ID{}, err
	}
	i := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return SPKIHash(c) == pin })
	if i < 1 {
		return Bundle{}, ID{}, &VerifyError{Code: CodeUnknownCA, ID: id, Detail: "the coordinator's root is not the one that the join token pins: this is another coordinator, or someone in between"}
	}
	root := chain[i]
	// Anyone can wrap the pinned public key in a certificate of their own wording; only its owner can sign that.
	if err := checkLink(root, root); err != nil {
		return Bundle{}, ID{}, &VerifyError{Code: CodeUnknownCA, ID: id, Detail: "the pinned root did not sign its own certificate"}
	}
	b, err := NewBundle(id.TrustDomain(), []*x509.Certificate{root}, 0)
	if err != nil {
		return Bundle{}, ID{}, err
	}
	v, err := VerifyX509(b, chain[:i+1], Options{Now: now, Usage: UsageServer})
	if err != nil {
		return Bundle{}, ID{}, err
	}
	if want := b.td.Coordinator(); v.ID != want {
		return Bundle{}, ID{}, idMismatch(want, v.ID)
	}
	return b, v.ID, nil
}

// VerifyDistribution verifies the certificate of the key that signs snapshots and Bindings: signed by a root itself,
// for that purpose alone. Such a certificate is refused by VerifyX509, and an SVID is refused here.
func VerifyDistribution(b Bundle, der []byte, now time.Time) (ed25519.PublicKey, error) {
	certs, err := ParseChain([][]byte{der})
	if err != nil {
		return nil, err
	}
	c := certs[0]
	if err := checkLimits(c); err != nil {
		return nil, err
	}
	id, err := leafID(c)
	if err != nil {
		return nil, err
	}
	if want := b.td.Distribution(); id != want {
		return nil, idMismatch(want, id)
	}
	bad := func(code Code, detail string) error { return &VerifyError{Code: code, ID: id, Detail: detail} }
	pub, ok := c.PublicKey.(ed25519.PublicKey)
	if !ok {
		return nil, bad(CodeAlgorithm, fmt.Sprintf("its key is %v, expected Ed25519", c.PublicKeyAlgorithm))
	}
	if c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature {
		return nil, bad(CodeKeyUsage, "key usage must be digitalSignature and nothing else")
	}
	if len(c.ExtKeyUsage) != 0 || len(c.UnknownExtKeyUsage) != 1 || !isDistributionEKU(c.UnknownExtKeyUsage[0]) {
		return nil, bad(CodeExtKeyUsage, "extended key usage must be the distribution of snapshots and nothing else")
	}
	if len(c.UnhandledCriticalExtensions) != 0 {
		return nil, bad(CodeCriticalExtn, "a critical extension is unknown")
	}
	if _, err := checkTime(c, id, Options{Now: now}); err != nil {
		return nil, err
	}
	root, err := findRoot(b, certs)
	if err != nil {
		return nil, err
	}
	if err := checkIssuerTime(root, now); err != nil {
		return nil, err
	}
	return pub, nil
}

func idMismatch(want, got ID) error {
	return &VerifyError{Code: CodeIDMismatch, ID: got, Detail: fmt.Sprintf("expected %s", want)}
}
